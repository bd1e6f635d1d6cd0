#include "flexkv/agent/copy_chunks.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

namespace flexkv::agent {
namespace {

// However runs and chunks fall: the chunks are full but for the last, and together are the command's blocks in order.
RC_GTEST_PROP(CopyChunks, TogetherAreTheCommandInOrder, ()) {
  proto::CopyCommand command;
  command.host_stride = 8192;
  const auto lengths = *rc::gen::container<std::vector<std::uint32_t>>(rc::gen::inRange<std::uint32_t>(1, 9));
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    command.runs.push_back({static_cast<std::uint32_t>(100 * i), lengths[i], 4096 + i * (1U << 20)});
  }
  const auto chunk = *rc::gen::inRange<std::size_t>(1, 20);
  const auto expected = command.blocks();
  CopyChunks chunks(command, chunk);
  std::size_t seen = 0;
  for (auto blocks = chunks.next(); !blocks.empty(); blocks = chunks.next()) {
    RC_ASSERT(blocks.size() == std::min(chunk, expected.size() - seen));
    for (const auto& block : blocks) {
      RC_ASSERT(block.device_block == expected[seen].device_block);
      RC_ASSERT(block.host_offset == expected[seen].host_offset);
      ++seen;
    }
  }
  RC_ASSERT(seen == expected.size());
}

}  // namespace
}  // namespace flexkv::agent
