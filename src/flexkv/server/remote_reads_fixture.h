// RemoteReads over a replica in the test's hands, and peers that only take note of what they are asked for.
#pragma once

#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "flexkv/cluster/names.h"
#include "flexkv/peer/messages.h"
#include "flexkv/peer/reading.h"
#include "flexkv/server/remote_reads.h"

namespace flexkv::server {

constexpr std::uint64_t kSlotBytes = 4096;
constexpr node::SpaceNumber kSpace = 5;
constexpr cluster::Incarnation kA = 0xA;
constexpr cluster::Incarnation kB = 0xB;

inline std::vector<key::BlockKey> chain(std::uint32_t blocks) {
  std::vector<key::BlockKey> keys;
  for (std::uint32_t i = 0; i < blocks; ++i) keys.push_back({i + 1, ~std::uint64_t{i}});
  return keys;
}

class RemoteReadsTest : public ::testing::Test {
 protected:
  RemoteReadsTest() {
    reads.open_space(kSpace, 0, {7}, kSlotBytes);
    for (const auto node : {kA, kB}) replica.refresh(node, "address of " + cluster::hex(node), now + 1000 * kSecond);
  }
  // Blocks [begin, end) of the chain.
  void has(cluster::Incarnation node, std::uint32_t begin, std::uint32_t end) {
    const auto keys = chain(end);
    for (std::uint32_t i = begin; i < end; ++i) {
      const cluster::Residency residency{cluster::tag_of(keys[i]), 1};
      ASSERT_TRUE(replica.apply(node, 0, {&residency, 1}));
    }
  }
  // Of a chain of so many blocks, those from `first` on.
  bool read(std::uint32_t blocks, std::uint32_t first, node::RemoteOp op = 1) {
    node::RemoteRead wanted;
    wanted.op = op;
    wanted.space = kSpace;
    wanted.keys = chain(blocks);
    wanted.first = first;
    for (std::uint32_t i = first; i < blocks; ++i) wanted.host_offsets.push_back(i * kSlotBytes);
    wanted.deadline = now + load_timeout;
    return reads.read(std::move(wanted), now);
  }
  std::uint32_t found(std::uint32_t blocks, std::uint32_t first) {
    return reads.find(kSpace, chain(blocks), first, 0, now).blocks;
  }
  // The latest request delivers so many blocks.
  void deliver(std::uint32_t blocks) {
    for (std::uint32_t i = 0; i < blocks; ++i) {
      now += kMillisecond;
      const auto arrived = reads.on_block(asked.back().id, now);
      ASSERT_TRUE(arrived);
      came.push_back(arrived->index);
    }
  }
  void wait_until_given_up() {
    for (const std::size_t before = given_up.size(); given_up.size() == before;) {
      ASSERT_TRUE(reads.next_time());
      now = *reads.next_time();
      ASSERT_LT(now, asked.back().deadline);
      reads.on_time(now);
    }
  }
  std::optional<RemoteReads::Ended> end(peer::Outcome outcome, bool may_go_on = true) {
    return reads.on_end(asked.back().id, outcome, may_go_on, now);
  }
  void expect_asked(cluster::Incarnation node, std::uint32_t first, std::uint32_t blocks) {
    const peer::ReadRequest& request = asked.back();
    EXPECT_EQ(request.node, cluster::hex(node));
    EXPECT_EQ(request.address, "address of " + cluster::hex(node));
    EXPECT_EQ(request.first, first);
    EXPECT_EQ(request.keys, chain(first + blocks));
    ASSERT_EQ(request.buffers.size(), blocks);
    for (std::uint32_t i = 0; i < blocks; ++i) {
      EXPECT_EQ(request.buffers[i].data(), pool.data() + (first + i) * kSlotBytes);
    }
    EXPECT_EQ(peer::problem_of(request), "");
  }

  Nanos now = 1000 * kSecond;
  Nanos load_timeout = 10 * kSecond;
  cluster::Replica replica{1 << 20};
  std::vector<std::byte> pool = std::vector<std::byte>(64 * kSlotBytes);
  std::vector<peer::ReadRequest> asked;
  std::vector<peer::RequestId> canceled;
  std::vector<peer::RequestId> given_up;
  std::vector<std::uint32_t> came;
  RemoteReads reads{
      replica,
      pool,
      77,
      {[this](peer::ReadRequest request) { asked.push_back(std::move(request)); },
       [this](peer::RequestId id) { canceled.push_back(id); }, [this](peer::RequestId id) { given_up.push_back(id); }}};
};

}  // namespace flexkv::server
