// What a store may hold or answer: headers, heads, names and listings, as they come and with a byte changed.
#include <array>
#include <string>
#include <vector>

#include "flexkv/base/assert.h"
#include "flexkv/remote/object.h"
#include "flexkv/remote/s3_list.h"
#include "input.h"

namespace flexkv::remote {
namespace {

using fuzz::Bytes;
using fuzz::Input;

constexpr std::uint64_t kSlotBytes = 32;
const ObjectCodec kCodec(SpaceName{1}, kSlotBytes);

// What is taken for a header is what would be written, whoever wrote it.
void fuzz_header(Input input) {
  ObjectName name;
  name.digest = input.pod<std::array<std::uint8_t, 16>>();
  name.blocks = input.pod<std::uint8_t>();
  const Bytes bytes = input.rest();
  Chain chain;
  if (kCodec.decode_header(bytes, name, chain)) return;
  FLEXKV_ASSERT(kCodec.name_of(chain) == name);
  FLEXKV_ASSERT(std::ranges::equal(kCodec.encode_header(chain), bytes.first(ObjectCodec::header_bytes(name.blocks))));
}

// A good object of which something was changed: no part that was changed is believed.
void fuzz_object(Input input) {
  const auto at = input.pod<std::uint16_t>();
  const auto change = input.pod<std::byte>();
  Chain chain{{input.pod<std::uint64_t>(), 0}, {}};
  const std::size_t count = 1 + input.pod<std::uint8_t>() % 4;
  for (std::size_t i = 0; i < count; ++i) chain.keys.push_back({input.pod<std::uint8_t>(), i});
  std::vector<std::byte> header = kCodec.encode_header(chain);
  const ObjectName name = kCodec.name_of(chain);
  if (at < header.size()) {
    header[at] ^= change;
    Chain read;
    FLEXKV_ASSERT(kCodec.decode_header(header, name, read).has_value() == (change != std::byte{}));
    return;
  }
  std::array<std::byte, kSlotBytes> payload{};
  std::ranges::copy(input.bytes(kSlotBytes), payload.begin());
  BlockHead head = kCodec.encode_head(chain.keys[0], chain.parent, payload);
  const std::size_t place = (at - header.size()) % (kHeadBytes + kSlotBytes);
  (place < kHeadBytes ? head[place] : payload[place - kHeadBytes]) ^= change;
  FLEXKV_ASSERT(kCodec.check_block(head, payload, chain.keys[0]).has_value() == (change != std::byte{}));
}

void fuzz_text(Input input) {
  const Bytes bytes = input.rest();
  const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  for (const std::string& path : {text, kCodec.folder() + text}) {
    const auto name = kCodec.parse_path(path);
    if (name) FLEXKV_ASSERT(kCodec.path_of(*name) == path);
  }
  for (const std::string& xml :
       {text, "<ListBucketResult><IsTruncated>true</IsTruncated>" + text + "</ListBucketResult>"}) {
    const auto page = parse_s3_page(xml);
    if (page.ok()) FLEXKV_ASSERT(!page.value().truncated || !page.value().objects.empty());
    FLEXKV_ASSERT(s3_error_code(xml).size() <= 64);
  }
}

}  // namespace
}  // namespace flexkv::remote

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace flexkv::remote;
  flexkv::fuzz::Input input(std::as_bytes(std::span(data, size)));
  switch (input.pod<std::uint8_t>() % 3) {
    case 0:
      fuzz_header(input);
      break;
    case 1:
      fuzz_object(input);
      break;
    default:
      fuzz_text(input);
  }
  return 0;
}
