#include "flexkv/disk/record.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>

namespace flexkv::disk {
namespace {

key::BlockKey any_key() { return {*rc::gen::arbitrary<std::uint64_t>(), *rc::gen::arbitrary<std::uint64_t>()}; }

Record any_record() {
  return {any_key(), any_key(), *rc::gen::arbitrary<std::uint64_t>(), *rc::gen::arbitrary<std::uint64_t>(),
          *rc::gen::arbitrary<std::uint64_t>()};
}

SpaceId any_space() {
  SpaceId space;
  for (auto& byte : space) byte = *rc::gen::arbitrary<std::uint8_t>();
  return space;
}

std::uint64_t any_slot_bytes() { return 4096 * *rc::gen::inRange<std::uint64_t>(1, 1 << 20); }

bool same(const Record& a, const Record& b) {
  return a.key == b.key && a.parent == b.parent && a.checksum == b.checksum && a.sequence == b.sequence &&
         a.epoch == b.epoch;
}

TEST(Record, IsReadAsItWasWrittenAndOnlyInItsPlace) {
  EXPECT_TRUE(rc::check([] {
    const SpaceId space = any_space();
    const std::uint64_t slot_bytes = any_slot_bytes();
    const SpaceCodec codec(space, slot_bytes);
    const Record record = any_record();
    const auto index = *rc::gen::arbitrary<std::uint32_t>();
    const RecordBytes bytes = codec.encode(record, index);
    Record read;
    RC_ASSERT(codec.decode(bytes, index, read) == SpaceCodec::Found::kRecord);
    RC_ASSERT(same(read, record));

    const auto elsewhere = *rc::gen::distinctFrom(index);
    RC_ASSERT(codec.decode(bytes, elsewhere, read) == SpaceCodec::Found::kDamaged);
    SpaceId other = space;
    other[*rc::gen::inRange<std::size_t>(0, other.size())] ^= *rc::gen::inRange<std::uint8_t>(1, 255);
    RC_ASSERT(SpaceCodec(other, slot_bytes).decode(bytes, index, read) == SpaceCodec::Found::kDamaged);
    RC_ASSERT(SpaceCodec(space, slot_bytes + 4096).decode(bytes, index, read) == SpaceCodec::Found::kDamaged);
  }));
}

TEST(Record, IsDamagedByAnyBit) {
  EXPECT_TRUE(rc::check([] {
    const SpaceCodec codec(any_space(), any_slot_bytes());
    const auto index = *rc::gen::arbitrary<std::uint32_t>();
    const RecordBytes bytes = codec.encode(any_record(), index);
    Record read;
    for (std::size_t bit = 0; bit < 8 * kRecordBytes; ++bit) {
      RecordBytes flipped = bytes;
      flipped[bit / 8] ^= std::byte{1} << bit % 8;
      RC_ASSERT(codec.decode(flipped, index, read) == SpaceCodec::Found::kDamaged);
    }
  }));
}

TEST(Slot, HoldsOnlyTheBlockAndTheBytesThatWereWritten) {
  EXPECT_TRUE(rc::check([] {
    const SpaceId space = any_space();
    const SpaceCodec codec(space, kRecordBytes);
    const auto index = *rc::gen::arbitrary<std::uint32_t>();
    const auto epoch = *rc::gen::arbitrary<std::uint64_t>();
    const key::BlockKey key = any_key();
    const RecordBytes payload = codec.encode(any_record(), 0);  // any bytes
    const std::uint64_t checksum = codec.payload_checksum(key, epoch, payload);
    const RecordBytes record = codec.encode({key, any_key(), checksum, 1, epoch}, index);
    RC_ASSERT(codec.holds(record, payload, index, key, epoch));

    RC_ASSERT(!codec.holds(record, payload, index + 1, key, epoch));
    RC_ASSERT(!codec.holds(record, payload, index, {key.high, key.low + 1}, epoch));
    RC_ASSERT(!codec.holds(record, payload, index, key, epoch + 1));
    RecordBytes flipped = payload;
    flipped[*rc::gen::inRange<std::size_t>(0, flipped.size())] ^= std::byte{1} << *rc::gen::inRange(0, 8);
    RC_ASSERT(!codec.holds(record, flipped, index, key, epoch));

    // The checksum alone tells blocks apart that have the same bytes.
    SpaceId other = space;
    other[*rc::gen::inRange<std::size_t>(0, other.size())] ^= *rc::gen::inRange<std::uint8_t>(1, 255);
    RC_ASSERT(SpaceCodec(other, kRecordBytes).payload_checksum(key, epoch, payload) != checksum);
    RC_ASSERT(SpaceCodec(space, 2 * kRecordBytes).payload_checksum(key, epoch, payload) != checksum);
    RC_ASSERT(codec.payload_checksum({key.high + 1, key.low}, epoch, payload) != checksum);
    RC_ASSERT(codec.payload_checksum(key, epoch + 1, payload) != checksum);
  }));
}

// A write that a power cut has ended in the middle, in either direction.
TEST(Record, TornBetweenTwoIsNeither) {
  EXPECT_TRUE(rc::check([] {
    const SpaceCodec codec(any_space(), any_slot_bytes());
    const auto index = *rc::gen::arbitrary<std::uint32_t>();
    const RecordBytes before = *rc::gen::arbitrary<bool>() ? codec.encode(any_record(), index) : RecordBytes{};
    const RecordBytes after = codec.encode(any_record(), index);
    const auto cut = *rc::gen::inRange<std::ptrdiff_t>(0, kRecordBytes + 1);
    RecordBytes torn = before;
    std::copy_n(after.begin(), cut, torn.begin());
    Record read;
    const auto found = codec.decode(torn, index, read);
    if (torn == after || torn == before) {
      RC_ASSERT(found == (torn == RecordBytes{} ? SpaceCodec::Found::kEmpty : SpaceCodec::Found::kRecord));
    } else {
      RC_ASSERT(found == SpaceCodec::Found::kDamaged);
    }
  }));
}

TEST(Header, IsReadAsItWasWrittenAndByItsSpaceOnly) {
  EXPECT_TRUE(rc::check([] {
    const Header header{any_space(), any_slot_bytes(), *rc::gen::nonZero<std::uint64_t>()};
    const HeaderPage page = encode_header(header);
    Header read;
    RC_ASSERT(decode_header(page, header.space, header.slot_bytes, read) == HeaderFault::kNone);
    RC_ASSERT(read.space == header.space && read.slot_bytes == header.slot_bytes && read.epoch == header.epoch);
    RC_ASSERT(decode_header(page, header.space, header.slot_bytes + 4096, read) == HeaderFault::kOtherSlots);
    SpaceId other = header.space;
    other[*rc::gen::inRange<std::size_t>(0, other.size())] ^= *rc::gen::inRange<std::uint8_t>(1, 255);
    RC_ASSERT(decode_header(page, other, header.slot_bytes, read) == HeaderFault::kOtherSpace);

    constexpr std::size_t kUsed = 80;
    HeaderPage flipped = page;
    flipped[*rc::gen::inRange<std::size_t>(0, kUsed)] ^= std::byte{1} << *rc::gen::inRange(0, 8);
    const HeaderFault fault = decode_header(flipped, header.space, header.slot_bytes, read);
    RC_ASSERT(fault == HeaderFault::kDamaged || fault == HeaderFault::kVersion);

    const HeaderPage later = encode_header({header.space, header.slot_bytes, *rc::gen::nonZero<std::uint64_t>()});
    HeaderPage torn = page;
    std::copy_n(later.begin(), *rc::gen::inRange<std::ptrdiff_t>(0, kUsed + 1), torn.begin());
    RC_ASSERT(torn == page || torn == later ||
              decode_header(torn, header.space, header.slot_bytes, read) == HeaderFault::kDamaged);
  }));
}

TEST(Epoch, IsYoungerThanAllBeforeItWhateverTheClock) {
  EXPECT_TRUE(rc::check([] {
    std::uint64_t epoch = 0;
    const auto clock = *rc::gen::container<std::vector<std::uint32_t>>(rc::gen::arbitrary<std::uint32_t>());
    for (const std::uint32_t seconds : clock) {
      RC_PRE(epoch >> 32 < UINT32_MAX);
      const std::uint64_t next = next_epoch(epoch, seconds, *rc::gen::arbitrary<std::uint32_t>());
      RC_ASSERT(next > epoch);
      RC_ASSERT(next >> 32 >= seconds);
      epoch = next;
    }
  }));
}

}  // namespace
}  // namespace flexkv::disk
