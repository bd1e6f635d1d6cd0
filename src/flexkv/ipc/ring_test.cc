#include "flexkv/ipc/ring.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <sys/mman.h>

#include <cstring>
#include <deque>
#include <thread>

#include "flexkv/base/prng.h"
#include "flexkv/ipc/test_support.h"

namespace flexkv::ipc {
namespace {

using testing::open_fds;
using testing::readable;

struct Ends {
  explicit Ends(std::size_t capacity = kMinRingCapacity)
      : memory(RingMemory::create(capacity).value()),
        consumer_wake(make_eventfd().value()),
        producer_wake(make_eventfd().value()),
        producer(memory, consumer_wake.get()),
        consumer(memory, producer_wake.get()) {}

  RingMemory memory;
  Fd consumer_wake;
  Fd producer_wake;
  RingProducer producer;
  RingConsumer consumer;
};

std::vector<std::byte> record_of(std::size_t size, std::uint64_t seed) {
  std::vector<std::byte> record(size);
  Prng prng(seed);
  for (auto& byte : record) byte = static_cast<std::byte>(prng.next());
  return record;
}

TEST(Ring, BehavesAsABoundedQueue) {
  EXPECT_TRUE(rc::check([](std::uint64_t seed) {
    Ends ends;
    struct Entry {
      std::vector<std::byte> record;
      std::size_t space;  // with the skip before it
    };
    std::deque<Entry> model;
    std::size_t used = 0;
    std::size_t tail = 0;
    Prng prng(seed);
    std::vector<std::byte> out;
    for (int i = 0; i < 2000; ++i) {
      if (prng.chance(55)) {
        const std::size_t size = prng.below((prng.chance(80) ? 200 : ends.producer.max_record()) + 1);
        const auto record = record_of(size, prng.next());
        const std::span<const std::byte> whole(record);
        const std::size_t cut = prng.below(size + 1);
        std::size_t space = (size + 4 + 7) / 8 * 8;
        if (tail + space > kMinRingCapacity) space += kMinRingCapacity - tail;
        const bool fits = used + space <= kMinRingCapacity;
        RC_ASSERT(ends.producer.push(whole.first(cut), whole.subspan(cut)) == fits);
        if (!fits) continue;
        model.push_back({record, space});
        used += space;
        tail = (tail + space) % kMinRingCapacity;
      } else if (model.empty()) {
        RC_ASSERT(ends.consumer.pop(out) == PopResult::kEmpty);
      } else {
        RC_ASSERT(ends.consumer.pop(out) == PopResult::kRecord);
        RC_ASSERT(out == model.front().record);
        used -= model.front().space;
        model.pop_front();
      }
    }
    RC_ASSERT(!ends.producer.broken());
  }));
}

TEST(Ring, LargestRecordFitsAtEveryOffset) {
  Ends ends;
  const auto large = record_of(ends.producer.max_record(), 1);
  std::vector<std::byte> out;
  for (std::size_t i = 0; i < 3 * kMinRingCapacity / 8; ++i) {
    ASSERT_TRUE(ends.producer.push(large));
    ASSERT_EQ(ends.consumer.pop(out), PopResult::kRecord);
    ASSERT_EQ(out, large);
    ASSERT_TRUE(ends.producer.push({}));
    ASSERT_EQ(ends.consumer.pop(out), PopResult::kRecord);
    ASSERT_TRUE(out.empty());
  }
}

TEST(Ring, RingsOnlyASleepingConsumer) {
  Ends ends;
  std::vector<std::byte> out;
  const auto record = record_of(8, 1);
  ASSERT_TRUE(ends.producer.push(record));
  EXPECT_FALSE(readable(ends.consumer_wake.get(), 0));
  EXPECT_FALSE(ends.consumer.arm());
  ASSERT_EQ(ends.consumer.pop(out), PopResult::kRecord);
  EXPECT_TRUE(ends.consumer.arm());
  ASSERT_TRUE(ends.producer.push(record));
  ASSERT_TRUE(readable(ends.consumer_wake.get(), 0));
  drain_eventfd(ends.consumer_wake.get());
  ASSERT_TRUE(ends.producer.push(record));
  EXPECT_FALSE(readable(ends.consumer_wake.get(), 0));
}

TEST(Ring, RingsAStarvedProducerOnceHalfIsFree) {
  Ends ends;
  std::vector<std::byte> out;
  const auto record = record_of(252, 1);  // 256 bytes of room: 16 fill the ring
  int pushed = 0;
  while (ends.producer.push(record)) ++pushed;
  EXPECT_EQ(pushed, 16);
  for (int popped = 1; popped <= 8; ++popped) {
    EXPECT_FALSE(readable(ends.producer_wake.get(), 0));
    ASSERT_EQ(ends.consumer.pop(out), PopResult::kRecord);
  }
  EXPECT_TRUE(readable(ends.producer_wake.get(), 0));
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(ends.producer.push(record));
  EXPECT_FALSE(ends.producer.push(record));
}

TEST(Ring, BrokenTailIsCorruptAndStaysSo) {
  for (const std::uint64_t tail : {std::uint64_t{4}, std::uint64_t{kMinRingCapacity + 8}, ~std::uint64_t{0} - 7}) {
    Ends ends;
    std::vector<std::byte> out;
    ends.memory.header()->tail.store(tail);
    EXPECT_EQ(ends.consumer.pop(out), PopResult::kCorrupt);
    ends.memory.header()->tail.store(0);
    EXPECT_EQ(ends.consumer.pop(out), PopResult::kCorrupt);
    EXPECT_FALSE(ends.consumer.arm());
  }
}

TEST(Ring, BrokenLengthIsCorrupt) {
  const auto pop_with = [](std::uint32_t length, std::uint64_t tail) {
    Ends ends;
    std::memcpy(ends.memory.data(), &length, sizeof(length));
    ends.memory.header()->tail.store(tail);
    std::vector<std::byte> out;
    return ends.consumer.pop(out);
  };
  EXPECT_EQ(pop_with(12, 16), PopResult::kRecord);
  EXPECT_EQ(pop_with(13, 16), PopResult::kCorrupt);
  EXPECT_EQ(pop_with(kMinRingCapacity / 2 - 3, kMinRingCapacity), PopResult::kCorrupt);
  EXPECT_EQ(pop_with(0xFFFF'FFFE, kMinRingCapacity), PopResult::kCorrupt);
  EXPECT_EQ(pop_with(0xFFFF'FFFF, 8), PopResult::kCorrupt) << "a skip without a record";
  EXPECT_EQ(pop_with(0xFFFF'FFFF, kMinRingCapacity), PopResult::kCorrupt) << "a skip of the whole ring";
}

TEST(Ring, BrokenHeadStopsTheProducer) {
  const auto record = record_of(1000, 1);
  for (const std::uint64_t head : {std::uint64_t{1} << 40, ~std::uint64_t{0}, std::uint64_t{kMinRingCapacity + 8}}) {
    Ends ends;
    ends.memory.header()->head.store(head);
    for (int i = 0; i < 10; ++i) (void)ends.producer.push(record);
    EXPECT_TRUE(ends.producer.broken());
    EXPECT_FALSE(ends.producer.push({}));
  }
}

TEST(Ring, RandomCorruptionIsSurvived) {
  EXPECT_TRUE(rc::check([](std::uint64_t seed) {
    Ends ends;
    Prng prng(seed);
    std::vector<std::byte> out;
    for (int i = 0; i < 300; ++i) {
      for (std::uint64_t n = prng.below(4); n > 0; --n) {
        ends.memory.data()[prng.below(kMinRingCapacity)] = static_cast<std::byte>(prng.next());
      }
      if (prng.chance(3)) ends.memory.header()->tail.fetch_add(prng.below(64) * 8);
      if (prng.chance(3)) ends.memory.header()->head.fetch_add(prng.below(64) * 8);
      (void)ends.producer.push(record_of(prng.below(300), 1));
      (void)ends.consumer.pop(out);
      RC_ASSERT(out.size() <= ends.producer.max_record());
    }
  }));
}

// Both sleep when they cannot go on: lost wake-ups show as a timeout of the test.
TEST(Ring, TwoThreads) {
  constexpr std::uint64_t kRecords = 100'000;
  Ends ends;
  const std::size_t before = open_fds();
  std::thread producer([&ends] {
    Prng prng(7);
    for (std::uint64_t i = 0; i < kRecords; ++i) {
      std::vector<std::byte> record(8 + prng.below(prng.chance(1) ? 2000 : 60), static_cast<std::byte>(i));
      while (!ends.producer.push(std::as_bytes(std::span(&i, 1)), std::span(record).subspan(8))) {
        ASSERT_TRUE(readable(ends.producer_wake.get()));
        drain_eventfd(ends.producer_wake.get());
      }
    }
  });
  std::vector<std::byte> out;
  std::uint64_t sleeps = 0;
  for (std::uint64_t expected = 0; expected < kRecords;) {
    const PopResult result = ends.consumer.pop(out);
    if (result == PopResult::kEmpty) {
      if (!ends.consumer.arm()) continue;
      ++sleeps;
      ASSERT_TRUE(readable(ends.consumer_wake.get()));
      drain_eventfd(ends.consumer_wake.get());
      ends.consumer.disarm();
      continue;
    }
    ASSERT_EQ(result, PopResult::kRecord);
    std::uint64_t value = 0;
    std::memcpy(&value, out.data(), sizeof(value));
    ASSERT_EQ(value, expected);
    for (std::size_t i = 8; i < out.size(); ++i) ASSERT_EQ(out[i], static_cast<std::byte>(expected));
    ++expected;
  }
  producer.join();
  std::printf("[ info     ] %lu records, consumer slept %lu times\n", kRecords, sleeps);
  EXPECT_EQ(open_fds(), before);
}

TEST(RingMemory, AttachSharesAndRefusesWhatCouldShrink) {
  auto memory = RingMemory::create(1 << 16).value();
  const Fd copy(::dup(memory.fd()));
  auto attached = RingMemory::attach(copy).value();
  EXPECT_EQ(attached.capacity(), std::size_t{1} << 16);
  const Fd wake = make_eventfd().value();
  RingProducer producer(memory, wake.get());
  RingConsumer consumer(attached, wake.get());
  ASSERT_TRUE(producer.push(testing::as_bytes("across")));
  std::vector<std::byte> out;
  ASSERT_EQ(consumer.pop(out), PopResult::kRecord);
  EXPECT_EQ(testing::as_text(out), "across");

  EXPECT_NE(::ftruncate(copy.get(), 0), 0);
  const auto attach = [](off_t size, int seals) {
    const Fd fd(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    EXPECT_EQ(::ftruncate(fd.get(), size), 0);
    EXPECT_EQ(::fcntl(fd.get(), F_ADD_SEALS, seals), 0);
    return RingMemory::attach(fd).ok();
  };
  constexpr off_t kSize = kRingHeaderBytes + kMinRingCapacity;
  EXPECT_TRUE(attach(kSize, F_SEAL_SHRINK | F_SEAL_GROW));
  EXPECT_FALSE(attach(kSize, F_SEAL_GROW));
  EXPECT_FALSE(attach(kSize, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE));
  EXPECT_FALSE(attach(kSize + 8, F_SEAL_SHRINK | F_SEAL_GROW));
  EXPECT_FALSE(attach(100, F_SEAL_SHRINK | F_SEAL_GROW));
  EXPECT_FALSE(attach(kRingHeaderBytes, F_SEAL_SHRINK | F_SEAL_GROW));
  EXPECT_FALSE(attach(off_t{1} << 40, F_SEAL_SHRINK | F_SEAL_GROW));
  EXPECT_FALSE(RingMemory::attach(Fd(::open("/dev/zero", O_RDWR | O_CLOEXEC))).ok());
  EXPECT_FALSE(RingMemory::attach(Fd()).ok());
}

}  // namespace
}  // namespace flexkv::ipc
