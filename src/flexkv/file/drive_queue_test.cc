// How much DriveQueue lets at a drive at once, and in what sizes.
#include "flexkv/file/drive_queue.h"

#include <gtest/gtest.h>

#include <array>

namespace flexkv::file {
namespace {

constexpr std::size_t kPage = kDirectAlignment;
constexpr std::size_t kMiB = 1 << 20;
constexpr FileId kFile{1};

struct DriveQueueTest : ::testing::Test {
  // Nothing here is ever touched: addresses are all that the queue looks at.
  static std::byte* memory(std::uint64_t at) { return reinterpret_cast<std::byte*>((std::uint64_t{1} << 40) + at); }
  static Request request(std::uint64_t tag, std::uint64_t offset, std::size_t bytes, Urgency urgency = Urgency::kLoad) {
    return {.tag = tag,
            .op = urgency == Urgency::kSave ? Op::kWrite : Op::kRead,
            .urgency = urgency,
            .file = kFile,
            .offset = offset,
            .data = memory(offset),
            .bytes = bytes};
  }
  static std::size_t bytes_of(const Io& io) {
    std::size_t sum = 0;
    for (const iovec& part : io.parts) sum += part.iov_len;
    return sum;
  }
  // The sizes of what may begin now, and their slots.
  struct Begun {
    std::vector<std::size_t> bytes;
    std::vector<std::uint32_t> slots;
    std::size_t writes = 0;
  };
  static Begun begin_all(DriveQueue& queue) {
    Begun begun;
    while (const Io* io = queue.begin(1)) {
      begun.bytes.push_back(bytes_of(*io));
      begun.slots.push_back(io->slot);
      begun.writes += io->op == Op::kWrite;
    }
    return begun;
  }
  DriveQueue queue_with(const DriveLimits& limits) { return DriveQueue(limits, FileId{0}, probe_page_.data()); }

  alignas(kPage) std::array<std::byte, kPage> probe_page_{};
};

TEST_F(DriveQueueTest, BytesInFlightAreBounded) {
  DriveQueue queue = queue_with({.depth = 8, .flight_bytes_max = 4 * kPage, .io_bytes_max = 2 * kPage});
  // Two pages each, and a page between them so that none are joined.
  for (std::uint64_t i = 0; i < 5; ++i) {
    const Request one = request(i, 3 * i * kPage, 2 * kPage);
    ASSERT_TRUE(queue.submit({&one, 1}, 1));
  }
  const Begun first = begin_all(queue);
  EXPECT_EQ(first.bytes, (std::vector<std::size_t>{2 * kPage, 2 * kPage}));
  queue.end(first.slots[0], 2 * kPage, 2);
  const Begun second = begin_all(queue);
  EXPECT_EQ(second.bytes.size(), 1u);
  // An error gives the bytes back as well, a short transfer keeps them.
  queue.end(first.slots[1], -EINVAL, 3);
  queue.end(second.slots[0], kPage, 3);
  const Begun third = begin_all(queue);
  EXPECT_EQ(third.bytes, (std::vector<std::size_t>{kPage, 2 * kPage}));
  queue.end(third.slots[0], kPage, 4);
  queue.end(third.slots[1], 2 * kPage, 4);
  const Begun last = begin_all(queue);
  ASSERT_EQ(last.bytes.size(), 1u);
  queue.end(last.slots[0], 2 * kPage, 5);
  EXPECT_TRUE(queue.idle());
}

TEST_F(DriveQueueTest, WhatIsLargerThanTheBoundGoesAlone) {
  DriveQueue queue = queue_with({.depth = 8, .flight_bytes_max = kPage, .io_bytes_max = 4 * kPage});
  const Request requests[] = {request(1, 0, 4 * kPage), request(2, 8 * kPage, 4 * kPage, Urgency::kSave)};
  ASSERT_TRUE(queue.submit(requests, 1));
  const Begun first = begin_all(queue);
  EXPECT_EQ(first.bytes, (std::vector<std::size_t>{4 * kPage}));
  queue.end(first.slots[0], 4 * kPage, 2);
  EXPECT_EQ(begin_all(queue).writes, 1u);
}

TEST_F(DriveQueueTest, WritesGetAQuarterOfTheBytesWhileAnythingIsRead) {
  DriveQueue queue = queue_with({.depth = 64, .flight_bytes_max = 16 * kMiB});
  std::vector<Request> requests{request(0, 0, 2 * kMiB)};
  for (std::uint64_t i = 1; i <= 8; ++i) requests.push_back(request(i, 3 * i * kMiB, 2 * kMiB, Urgency::kSave));
  ASSERT_TRUE(queue.submit(requests, 1));
  const Begun reading = begin_all(queue);
  EXPECT_EQ(reading.bytes.size() - reading.writes, 1u);
  EXPECT_EQ(reading.writes, 2u);
  queue.end(reading.slots[0], 2 * kMiB, 2);  // the read: loads go first
  EXPECT_EQ(begin_all(queue).writes, 6u);
}

TEST_F(DriveQueueTest, FewReadsAtOnceSoThatTheFirstIsThereEarly) {
  DriveQueue queue = queue_with({.depth = 64, .flight_bytes_max = 64 * kMiB, .read_bytes_max = 8 * kMiB});
  std::vector<Request> requests;
  for (std::uint64_t i = 0; i < 4; ++i) requests.push_back(request(i, 5 * i * kMiB, 4 * kMiB));
  for (std::uint64_t i = 4; i < 8; ++i) requests.push_back(request(i, 5 * i * kMiB, 4 * kMiB, Urgency::kSave));
  ASSERT_TRUE(queue.submit(requests, 1));
  const Begun first = begin_all(queue);
  EXPECT_EQ(first.bytes.size(), 2u);
  EXPECT_EQ(first.writes, 0u);  // the reads that wait are before them all the same
  queue.end(first.slots[0], 4 * kMiB, 2);
  const Begun second = begin_all(queue);
  EXPECT_EQ(second.bytes.size(), 1u);
  EXPECT_EQ(second.writes, 0u);
}

TEST_F(DriveQueueTest, ADriveThatMayOnlyBeReadIsReadOn) {
  DriveQueue queue = queue_with({.depth = 64});
  std::vector<Request> writes;
  for (std::uint64_t i = 0; i < 64; ++i) writes.push_back(request(i, 2 * i * kPage, kPage, Urgency::kSave));
  ASSERT_TRUE(queue.submit(writes, 1));
  const Begun begun = begin_all(queue);
  ASSERT_EQ(begun.slots.size(), 64u);
  for (const std::uint32_t slot : begun.slots) queue.end(slot, -EROFS, 2);
  const Request read = request(100, 0, kPage);
  ASSERT_TRUE(queue.submit({&read, 1}, 3));
  EXPECT_EQ(begin_all(queue).bytes.size(), 1u);
}

TEST_F(DriveQueueTest, AProbeThatMayNotWriteReads) {
  DriveQueue queue = queue_with({.depth = 8});
  std::vector<Request> reads;
  for (std::uint64_t i = 0; i < 8; ++i) reads.push_back(request(i, 2 * i * kPage, kPage));
  ASSERT_TRUE(queue.submit(reads, 1));
  for (const std::uint32_t slot : begin_all(queue).slots) queue.end(slot, -EIO, 2);
  const Nanos later = 2 + kSecond;
  const Io* probe = queue.begin(later);
  ASSERT_NE(probe, nullptr);
  ASSERT_EQ(probe->op, Op::kWrite);
  queue.end(probe->slot, -EROFS, later);
  probe = queue.begin(later);
  ASSERT_NE(probe, nullptr);
  ASSERT_EQ(probe->op, Op::kRead);
  queue.end(probe->slot, kPage, later);
  const Request read = request(100, 0, kPage);
  EXPECT_TRUE(queue.submit({&read, 1}, later));
  EXPECT_NE(queue.begin(later), nullptr);
}

TEST_F(DriveQueueTest, ABlockIsOneIoAndNeighboursAreJoinedToAMegabyte) {
  DriveQueue queue = queue_with({});
  std::vector<Request> requests{request(0, 0, 4 * kMiB), request(1, 8 * kMiB, 5 * kMiB)};
  for (std::uint64_t i = 0; i < 16; ++i) requests.push_back(request(2 + i, 16 * kMiB + i * kMiB / 4, kMiB / 4));
  ASSERT_TRUE(queue.submit(requests, 1));
  EXPECT_EQ(begin_all(queue).bytes, (std::vector<std::size_t>{4 * kMiB, 4 * kMiB, kMiB, kMiB, kMiB, kMiB, kMiB}));
}

}  // namespace
}  // namespace flexkv::file
