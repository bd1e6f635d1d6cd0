// The link to a node of this machine.
#include <sys/poll.h>
#include <sys/socket.h>

#include <limits>
#include <utility>

#include "flexkv/base/log.h"
#include "flexkv/client/node_link.h"
#include "flexkv/ipc/channel.h"
#include "flexkv/ipc/wait.h"

namespace flexkv::client {
namespace {

constexpr Nanos kForever = std::numeric_limits<Nanos>::max() / 4;

class UnixLink final : public NodeLink {
 public:
  UnixLink(ipc::Channel channel, std::string node) : channel_(std::move(channel)), node_(std::move(node)) {}

  bool send(const proto::FromClient& message) override {
    const auto bytes = proto::encode(message);
    return bytes.size() <= channel_.max_record() && channel_.send(bytes);
  }

  Take take(proto::ToClient& out) override {
    const ipc::PopResult popped = channel_.pop(record_);
    if (popped == ipc::PopResult::kEmpty) return Take::kNothing;
    if (popped == ipc::PopResult::kCorrupt) return Take::kBroken;
    auto message = proto::decode_to_client(record_);
    if (!message) {
      log_error("node " + node_ + ": " + message.error().message);
      return Take::kBroken;
    }
    out = std::move(message).value();
    return Take::kMessage;
  }

  bool sleep_until(Nanos deadline) override {
    if (!channel_.arm_sleep()) return true;
    const Nanos left = deadline - monotonic_now();
    if (left <= 0) {
      channel_.disarm();
      return false;
    }
    pollfd fds[] = {{channel_.wake_fd(), POLLIN, 0}, {channel_.socket_fd(), POLLIN, 0}};
    const timespec timeout{left / kSecond, left % kSecond};
    (void)::ppoll(fds, 2, &timeout, nullptr);
    channel_.disarm();
    if (fds[1].revents != 0) closed_ = channel_.peer_gone();
    return true;
  }

  bool gone() const override { return closed_ || channel_.broken(); }
  // The dialer sees it, and looks for the next connection.
  void end() override { ::shutdown(channel_.socket_fd(), SHUT_RDWR); }

 private:
  ipc::Channel channel_;
  const std::string node_;
  std::vector<std::byte> record_;
  bool closed_ = false;  // by the node
};

class UnixDialer final : public Dialer {
 public:
  UnixDialer(std::string runtime_dir, std::string node_name, const proto::ClientHello& hello)
      : runtime_dir_(std::move(runtime_dir)), node_name_(std::move(node_name)), hello_(hello) {}

  std::string node() const override { return "'" + node_name_ + "'"; }

  Result<Dialed> dial(int stop_fd) override {
    auto socket = ipc::wait_for_socket(runtime_dir_, node_name_, stop_fd, kForever);
    if (!socket) return socket.error();
    ipc::Hello frame;
    frame.role = static_cast<std::uint32_t>(proto::Role::kClient);
    frame.payload = proto::encode(hello_);
    auto connected = ipc::Channel::connect(std::move(socket).value(), frame, kHandshakeTimeout);
    if (!connected) return connected.error();
    const auto welcome = proto::decode_welcome(connected.value().payload);
    if (!welcome) return welcome.error();
    watched_ = Fd(::dup(connected.value().channel.socket_fd()));
    if (!watched_.valid()) return errno_error("dup", errno);
    return Dialed{std::make_unique<UnixLink>(std::move(connected.value().channel), node()), welcome.value().key_secret};
  }

  // Only the end of the connection is of interest here; the scheduler's thread reads what comes.
  bool carry(int stop_fd) override {
    pollfd fds[] = {{watched_.get(), POLLRDHUP, 0}, {stop_fd, POLLIN, 0}};
    while (fds[0].revents == 0 && fds[1].revents == 0) (void)::poll(fds, 2, -1);
    return fds[1].revents == 0;
  }

 private:
  const std::string runtime_dir_;
  const std::string node_name_;
  const proto::ClientHello hello_;
  Fd watched_;
};

}  // namespace

Result<std::unique_ptr<HostPort>> open_unix_port(const std::string& runtime_dir, const std::string& node_name,
                                                 const proto::ClientHello& hello) {
  return open_dialed_port(std::make_unique<UnixDialer>(runtime_dir, node_name, hello));
}

}  // namespace flexkv::client
