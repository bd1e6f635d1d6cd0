// Decoders of the directory on arbitrary bytes, and a follower that is fed with entries which are well-formed but of
// any content. What decodes must encode to the same bytes.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "flexkv/base/assert.h"
#include "flexkv/cluster/follower.h"
#include "flexkv/cluster/wire.h"
#include "input.h"

namespace {

using namespace flexkv::cluster;
using flexkv::fuzz::Input;

void check_bytes(std::string_view bytes) {
  if (const auto batch = decode_batch(bytes, "here")) FLEXKV_ASSERT(encode_batch(batch.value(), "here") == bytes);
  if (const auto beat = decode_beat(bytes, "here")) FLEXKV_ASSERT(encode_beat(beat.value(), "here") == bytes);
}

// Behind a right checksum, so that the fuzzer gets past it.
void check_sealed(std::string_view bytes) {
  for (const std::uint32_t magic : {0x32424446U, 0x32484446U}) {
    std::string sealed(reinterpret_cast<const char*>(&magic), sizeof(magic));
    sealed += bytes;
    seal_entry(sealed, "here");
    check_bytes(sealed);
  }
}

std::string some_batch(Input& input, std::string_view place) {
  Batch batch;
  batch.number = input.pod<std::uint8_t>();
  const auto shape = input.pod<std::uint8_t>();
  batch.cleared = (shape & 1) != 0;
  for (unsigned i = 0; i < (shape >> 1 & 15U); ++i) {
    const auto byte = input.pod<std::uint8_t>();
    const Before before = (shape & 32) != 0 ? input.pod<std::uint8_t>() : kUnsaid;
    batch.residencies.push_back({byte, static_cast<Tiers>(byte >> 4), before});
  }
  return encode_batch(batch, place);
}

void check_follower(Input input) {
  Replica replica(50);
  replica.refresh(1, "", 1'000'000);
  FollowerStats stats;
  Follower follower(1, 0, "stream", "snapshot:", replica, stats);
  flexkv::Nanos now = 0;
  while (!input.empty()) {
    now += 30 * flexkv::kSecond;
    if ((input.pod<std::uint8_t>() & 1) != 0) {
      Beat::Space space;
      space.head = input.pod<std::uint8_t>();
      space.generation = input.pod<std::uint8_t>();
      space.base = input.pod<std::uint8_t>();
      space.part_count = input.pod<std::uint8_t>();
      follower.told(space, now);
    } else if (follower.loading()) {
      std::vector<flexkv::meta::Answer> parts;
      for (const auto& op : follower.load_request()) {
        parts.push_back({(input.pod<std::uint8_t>() & 7) != 0, some_batch(input, op.key), {}, {}});
      }
      follower.loaded(parts, now);
    } else if (follower.following()) {
      std::vector<flexkv::meta::Entry> entries;
      for (unsigned i = 0; i < input.pod<std::uint8_t>() % 4U; ++i) {
        entries.push_back({0, flexkv::meta::entry_id(follower.known() + 1 + i), some_batch(input, "stream")});
      }
      follower.read(entries, (input.pod<std::uint8_t>() & 1) != 0, follower.promised(), now);
    }
    FLEXKV_ASSERT(replica.stats().blocks <= 50);
    FLEXKV_ASSERT(!follower.stuck() || replica.content(1, 0).empty());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0] % 3) {
    case 0:
      check_bytes(bytes);
      break;
    case 1:
      check_sealed(bytes);
      break;
    default:
      check_follower(Input(std::as_bytes(std::span(bytes))));
      break;
  }
  return 0;
}
