#include "flexkv/ipc/pending.h"

#include <algorithm>

namespace flexkv::ipc {

Result<PendingChannel::Step> PendingChannel::advance() {
  Frame frame;
  const auto outcome = socket_.recv(frame);
  if (!outcome) return outcome.error();
  if (outcome.value() == RecvOutcome::kWouldBlock) return Step::kWaiting;
  if (outcome.value() == RecvOutcome::kClosed) return Error{ErrorCode::kPeer, "the client left before its Hello"};
  if (!frame.fds.empty()) return Error{ErrorCode::kPeer, "a Hello carries no descriptors"};
  auto hello = decode_hello(frame.bytes);
  if (!hello) {
    if (hello.error().code == ErrorCode::kUnsupported) refuse(hello.error());
    return hello.error();
  }
  hello_ = std::move(hello).value();
  return Step::kHello;
}

void PendingChannel::refuse(const Error& error) {
  // A client that cannot be told finds out by the end of the connection.
  (void)socket_.send(encode_refused(error));
}

std::optional<int> PendingChannels::add(Socket socket, Nanos now) {
  PendingChannel client(std::move(socket), now + patience_);
  if (clients_.size() >= max_clients_) {
    client.refuse({ErrorCode::kNoSpace, "too many clients are connecting at once"});
    return std::nullopt;
  }
  clients_.push_back(std::move(client));
  return clients_.back().fd();
}

PendingChannel* PendingChannels::find(int fd) {
  const auto it = std::ranges::find(clients_, fd, &PendingChannel::fd);
  return it == clients_.end() ? nullptr : &*it;
}

PendingChannel PendingChannels::take(int fd) {
  const auto it = std::ranges::find(clients_, fd, &PendingChannel::fd);
  FLEXKV_ASSERT(it != clients_.end());
  PendingChannel client = std::move(*it);
  clients_.erase(it);
  return client;
}

std::size_t PendingChannels::expire(Nanos now) {
  const auto alive = std::ranges::find_if(clients_, [now](const auto& client) { return client.deadline() > now; });
  const auto count = static_cast<std::size_t>(alive - clients_.begin());
  clients_.erase(clients_.begin(), alive);
  return count;
}

std::optional<Nanos> PendingChannels::next_deadline() const {
  if (clients_.empty()) return std::nullopt;
  return clients_.front().deadline();
}

}  // namespace flexkv::ipc
