// What clients say and hear of the blocks that are kept (module events), and its encoding. Values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "flexkv/events/change.h"
#include "flexkv/ipc/wire.h"

namespace flexkv::proto {

constexpr std::size_t kDescribedBlocksMax = 4096;       // in one message
constexpr std::size_t kDescribedBytesMax = 512 * 1024;  // of their tokens
constexpr std::size_t kChangesMax = 256;                // in one message

// client -> node: what the engine calls blocks [first_block, first_block + hashes.size()) of a sequence. Said before
// they are saved, or when a lookup has found them. No answer.
struct DescribeRequest {
  std::uint64_t sequence = 0;
  std::uint32_t first_block = 0;
  std::string parent_hash;  // of the block before the first; empty: there is none
  std::vector<std::string> hashes;
  std::vector<std::uint32_t> tokens;  // of all blocks, equally many each
  std::vector<std::string> details;   // of each block, or one for all
};
// client -> node: it wants to hear changes of what is kept of its model; one answer, as soon as there are any.
struct ChangesRequest {};
// node -> client
struct ChangesReply {
  std::vector<events::Change> changes;
};

// Whether the counts fit together and lie within what messages may have.
bool valid(const DescribeRequest& request);
// The blocks' descriptions. REQUIRES: valid(request)
std::vector<events::DescriptionRef> descriptions(const DescribeRequest& request);

void write(ipc::Writer& writer, const DescribeRequest& request);
void write(ipc::Writer& writer, const ChangesReply& reply);
// Nothing: malformed.
std::optional<DescribeRequest> read_describe_request(ipc::Reader& reader);
std::optional<ChangesReply> read_changes_reply(ipc::Reader& reader);

}  // namespace flexkv::proto
