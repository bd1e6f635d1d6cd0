// For tests: both ends of a connection, and a reader that compares what it gets with test_source.h.
#pragma once

#include <gtest/gtest.h>
#include <sys/socket.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "flexkv/net/tls.h"
#include "flexkv/peer/test_source.h"

namespace flexkv::peer::testing {

inline net::TlsContext context() {
  return net::TlsContext::create(net::Secret::from_text(std::string(net::Secret::kMinBytes, 's')).value(), "test")
      .value();
}

inline std::pair<Fd, Fd> sockets() {
  int fds[2];
  FLEXKV_ASSERT(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
  return {Fd(fds[0]), Fd(fds[1])};
}

struct Sink : ReadSink {
  struct Read {
    std::vector<key::BlockKey> keys;  // of the blocks that are wanted
    std::uint64_t slot_bytes = 0;
    std::vector<std::vector<std::byte>> buffers;
    std::uint32_t blocks = 0;
    std::optional<Outcome> outcome;
  };
  void on_block(RequestId id, std::uint32_t index) override {
    Read& read = reads.at(id);
    ASSERT_FALSE(read.outcome);
    ASSERT_EQ(index, read.blocks++);
    ASSERT_EQ(read.buffers[index], bytes_of(read.keys[index], read.slot_bytes));
  }
  void on_end(RequestId id, Outcome outcome) override {
    Read& read = reads.at(id);
    ASSERT_FALSE(read.outcome);
    read.outcome = outcome;
    ASSERT_TRUE(outcome != Outcome::kDone || read.blocks == read.keys.size());
    // They are ours again: whatever comes later must not go there.
    for (auto& buffer : read.buffers) buffer.assign(buffer.size(), std::byte{0xEE});
  }
  void check_untouched() const {
    for (const auto& [id, read] : reads) {
      if (!read.outcome) continue;
      for (const auto& buffer : read.buffers) {
        ASSERT_EQ(buffer, std::vector<std::byte>(buffer.size(), std::byte{0xEE})) << "request " << id;
      }
    }
  }
  std::map<RequestId, Read> reads;
};

}  // namespace flexkv::peer::testing
