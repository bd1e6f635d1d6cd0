// For tests: a reader and an owner that are connected, both in the test's thread.
#pragma once

#include <gtest/gtest.h>

#include <csignal>
#include <functional>
#include <optional>
#include <vector>

#include "flexkv/peer/reading.h"
#include "flexkv/peer/serving.h"
#include "flexkv/peer/test_exchange.h"

namespace flexkv::peer::testing {

constexpr std::size_t kPlenty = 64U << 20;

class Exchange : public ::testing::Test {
 protected:
  static constexpr std::uint64_t kHas = 50;  // blocks that the owner has

  void SetUp() override {
    ::signal(SIGPIPE, SIG_IGN);
    auto [a, b] = sockets();
    using Role = net::TlsStream::Role;
    reader_stream.emplace(net::TlsStream::create(context(), std::move(a), Role::kClient, "owner").value());
    owner_stream.emplace(net::TlsStream::create(context(), std::move(b), Role::kServer, "reader").value());
    reading.emplace(*reader_stream, sink, "r", "o");
    serving.emplace(*owner_stream, source, "o", pinned_bytes_max, [this](auto command) { posted.push_back(command); });
  }
  void step(std::size_t budget = kPlenty) {
    for (auto& command : std::exchange(posted, {})) command();
    reading->on_time(now);
    reader_stream->pump(*reading, budget);
    reading->fill(now);
    if (!serving) return;
    serving->on_time(now);
    owner_stream->pump(*serving, budget);
    serving->fill(now);
  }
  void run() {
    for (int i = 0; i < 50; ++i) step();
  }
  RequestId read(std::vector<std::uint64_t> blocks, std::uint64_t slot_bytes, Nanos timeout = 10 * kSecond,
                 std::uint32_t first = 0) {
    ReadRequest request;
    request.id = ++last;
    request.slot_bytes = slot_bytes;
    Sink::Read& read = sink.reads[request.id];
    for (const std::uint64_t block : blocks) request.keys.push_back({9, block});
    request.first = first;
    read.keys.assign(request.keys.begin() + first, request.keys.end());
    read.slot_bytes = slot_bytes;
    read.buffers.assign(blocks.size() - first, std::vector<std::byte>(slot_bytes));
    for (auto& buffer : read.buffers) request.buffers.emplace_back(buffer);
    request.deadline = now + timeout;
    reading->start(std::move(request));
    return last;
  }
  std::optional<Outcome> outcome(RequestId id) const { return sink.reads.at(id).outcome; }
  std::uint32_t got(RequestId id) const { return sink.reads.at(id).blocks; }

  std::uint64_t pinned_bytes_max = 8U << 20;
  Nanos now = 1000 * kSecond;
  TestSource source{kHas};
  Sink sink;
  std::vector<std::function<void()>> posted;
  std::optional<net::FrameStream> reader_stream;
  std::optional<net::FrameStream> owner_stream;
  std::optional<Reading> reading;
  std::optional<Serving> serving;
  RequestId last = 0;
};

}  // namespace flexkv::peer::testing
