// What an engine's scheduler and a node on another machine say to each other, in frames of a TLS connection
// (net/frame_stream.h): the messages of a client's channel.
//
//   scheduler -> node   kHello, whose id is kHostVersion, with a ClientHello; then kMessage with a FromClient each
//   node -> scheduler   kWelcome with a Welcome, or kRefused with a text; then kReply with a ToClient each
//
// Or, of an operator's command instead of a scheduler: kReset, whose id is kHostVersion, and kResetDone or kRefused
// once the node has forgotten all blocks.
//
// DescribeRequest and ChangesRequest have no place there.
#pragma once

#include <cstdint>

namespace flexkv::proto {

constexpr std::uint64_t kHostVersion = 1;

enum class HostFrame : std::uint32_t { kHello = 1, kWelcome, kRefused, kMessage, kReply, kReset, kResetDone };

// Of the TLS identity: who may read blocks of a node, as its peers may, uses another one.
constexpr const char* kHostPurpose = "engines of ";

}  // namespace flexkv::proto
