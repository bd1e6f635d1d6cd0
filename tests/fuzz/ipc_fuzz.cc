// What a hostile process on the other side can send: bytes to decode, a ring whose shared memory says anything at any
// time, frames and descriptors in place of a handshake. The first byte of the input chooses.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "flexkv/ipc/channel.h"
#include "flexkv/ipc/pending.h"
#include "flexkv/ipc/ring.h"
#include "flexkv/ipc/wire.h"
#include "input.h"

namespace flexkv::ipc {
namespace {

using fuzz::Bytes;
using fuzz::Input;

void fuzz_reader(Input input) {
  const auto program = input.bytes(16);
  Reader reader(input.rest());
  for (const std::byte step : program) {
    const auto cap = static_cast<std::size_t>(step) * 16;
    switch (static_cast<unsigned>(step) % 6) {
      case 0:
        (void)reader.pod<std::uint64_t>();
        break;
      case 1:
        FLEXKV_ASSERT(reader.string(cap).size() <= cap);
        break;
      case 2:
        FLEXKV_ASSERT(reader.array<std::uint64_t>(cap).size() <= cap);
        break;
      case 3:
        FLEXKV_ASSERT(reader.bytes(cap).size() <= cap);
        break;
      case 4:
        (void)reader.pod<std::uint8_t>();
        break;
      default:
        FLEXKV_ASSERT(!reader.done() || reader.ok());
    }
  }
}

// One ring of which both ends belong to us, between any steps of which the peer changes the memory.
void fuzz_ring(Input input) {
  const auto memory = RingMemory::create(kMinRingCapacity).value();
  const Fd wake = make_eventfd().value();
  RingProducer producer(memory, wake.get());
  RingConsumer consumer(memory, wake.get());
  RingHeader& header = *memory.header();
  std::vector<std::byte> out;
  const std::vector<std::byte> record(producer.max_record());
  while (!input.empty()) {
    switch (input.pod<std::uint8_t>() % 8) {
      case 0: {
        const auto at = input.pod<std::uint16_t>() % kMinRingCapacity;
        const auto bytes = input.bytes(std::min<std::size_t>(input.pod<std::uint8_t>(), kMinRingCapacity - at));
        std::ranges::copy(bytes, memory.data() + at);
        break;
      }
      case 1:
        header.tail.store(input.pod<std::uint64_t>());
        break;
      case 2:
        header.head.store(input.pod<std::uint64_t>());
        break;
      case 3:
        header.tail.fetch_add(std::uint64_t{input.pod<std::uint8_t>()} * 8);
        break;
      case 4:
        header.head.fetch_add(std::uint64_t{input.pod<std::uint8_t>()} * 8);
        break;
      case 5:
        if (consumer.arm()) consumer.disarm();
        break;
      case 6:
        (void)producer.push(std::span(record).first(input.pod<std::uint16_t>() % (record.size() + 1)));
        break;
      default:
        (void)consumer.pop(out);
        FLEXKV_ASSERT(out.size() <= record.size());
    }
  }
}

std::pair<Fd, Fd> raw_pair() {
  int fds[2] = {-1, -1};
  FLEXKV_ASSERT(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) == 0);
  return {Fd(fds[0]), Fd(fds[1])};
}

// Descriptors of all kinds, some of them what a Welcome must have.
std::vector<Fd> make_fds(Input& input) {
  std::vector<Fd> fds;
  const std::size_t count = input.pod<std::uint8_t>() % (kMaxFrameFds + 1);
  for (std::size_t i = 0; i < count; ++i) {
    switch (input.pod<std::uint8_t>() % 4) {
      case 0:
        fds.emplace_back(::dup(RingMemory::create(kMinRingCapacity).value().fd()));
        break;
      case 1:
        fds.push_back(make_eventfd().value());
        break;
      case 2:
        fds.emplace_back(::open("/dev/null", O_RDWR | O_CLOEXEC));
        break;
      default:
        fds.emplace_back(::memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING));
        (void)::ftruncate(fds.back().get(), input.pod<std::uint16_t>());
        (void)::fcntl(fds.back().get(), F_ADD_SEALS, input.pod<std::uint8_t>() & 0x1F);
    }
  }
  return fds;
}

void send_frame(Socket& peer, Bytes frame, const std::vector<Fd>& fds) {
  std::vector<int> raw(fds.size());
  std::ranges::transform(fds, raw.begin(), &Fd::get);
  if (!frame.empty()) (void)peer.send(frame.first(std::min(frame.size(), kMaxFrameBytes)), raw);
}

// A valid frame with some bytes changed gets further than noise does.
std::vector<std::byte> mutate(std::vector<std::byte> frame, Input& input) {
  while (!input.empty()) {
    const auto at = input.pod<std::uint8_t>();
    if (at == 0xFF) {
      const auto extra = input.bytes(input.pod<std::uint8_t>());
      frame.insert(frame.end(), extra.begin(), extra.end());
    } else if (at == 0xFE) {
      frame.resize(frame.size() / 2);
    } else if (at < frame.size()) {
      frame[at] ^= input.pod<std::byte>();
    }
  }
  return frame;
}

void fuzz_server(Input input) {
  auto [a, b] = raw_pair();
  auto peer = Socket::adopt(std::move(a)).value();
  PendingChannel pending(Socket::adopt(std::move(b)).value(), 0);
  const bool from_valid = input.pod<std::uint8_t>() % 2 == 0;
  const auto fds = input.pod<std::uint8_t>() % 8 == 0 ? make_fds(input) : std::vector<Fd>();
  if (from_valid) {
    const auto payload = input.bytes(input.pod<std::uint8_t>());
    const Hello hello{.role = 1, .payload = {payload.begin(), payload.end()}};
    send_frame(peer, mutate(encode_hello(hello), input), fds);
  } else {
    send_frame(peer, input.rest(), fds);
  }
  const auto step = pending.advance();
  if (step && step.value() == PendingChannel::Step::kHello) {
    FLEXKV_ASSERT(pending.hello().payload.size() <= kMaxPayload);
    FLEXKV_ASSERT(pending.accept(pending.hello().payload, {}, kMinRingCapacity).ok());
  }
}

void fuzz_client(Input input) {
  auto [a, b] = raw_pair();
  auto peer = Socket::adopt(std::move(a)).value();
  auto client = Socket::adopt(std::move(b)).value();
  const auto shape = input.pod<std::uint8_t>() % 3;
  const auto fds = make_fds(input);
  if (shape == 0) {
    send_frame(peer, mutate(encode_welcome(input.bytes(8)), input), fds);
  } else if (shape == 1) {
    send_frame(peer, mutate(encode_refused({ErrorCode::kNoSpace, "busy"}), input), fds);
  } else {
    send_frame(peer, input.rest(), fds);
  }
  auto connection = Channel::connect(std::move(client), {}, 0);
  if (!connection) return;
  std::vector<std::byte> out;
  Channel& channel = connection.value().channel;
  (void)channel.send(out);
  (void)channel.pop(out);
  (void)channel.peer_gone();
}

}  // namespace
}  // namespace flexkv::ipc

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace flexkv::ipc;
  Input input(std::as_bytes(std::span(data, size)));
  switch (input.pod<std::uint8_t>() % 4) {
    case 0:
      fuzz_reader(input);
      break;
    case 1:
      fuzz_ring(input);
      break;
    case 2:
      fuzz_server(input);
      break;
    default:
      fuzz_client(input);
  }
  return 0;
}
