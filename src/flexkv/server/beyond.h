// What lies beyond a node's machine, as one port: the other nodes of its cluster, and a store that all share. Chooses
// whom to ask by the time that it takes, puts a read together from several, and goes on elsewhere when one of them does
// not deliver.
//
// Guarded by the node's lock.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "flexkv/node/node.h"

namespace flexkv::server {

// Who is told of what a source delivers. Called under the node's lock.
class SourceSink {
 public:
  virtual ~SourceSink() = default;
  // As Node::on_remote_block and on_remote_end.
  virtual void on_block(node::Node& node, node::RemoteOp op, std::uint32_t index, Nanos now) = 0;
  virtual void on_end(node::Node& node, node::RemoteOp op, node::RemoteOutcome outcome, Nanos now) = 0;
};

class Beyond final : public node::RemotePort, public SourceSink {
 public:
  // The nearer ones first: of two that are as good the first is asked. A source's calls of its sink are
  // answers to reads of this only. It outlives this. REQUIRES: no call before
  void add(node::RemotePort& source) { sources_.push_back(&source); }
  // One that never began. Under the node's lock. REQUIRES: no space is open
  void drop(const node::RemotePort& source) { std::erase(sources_, &source); }
  bool empty() const { return sources_.empty(); }

  void open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) override;
  void close_space(node::SpaceNumber space) override;
  // What one source has, and what another one has behind that.
  node::RemoteFound find(node::SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                         double block_nanos, Nanos now) override;
  void read(node::RemoteRead read) override;
  void reset(node::ResetId reset) override;
  void cancel(node::RemoteOp op) override;
  std::optional<Nanos> next_time() const override;
  void on_time(Nanos now) override;

  void on_block(node::Node& node, node::RemoteOp part, std::uint32_t index, Nanos now) override;
  void on_end(node::Node& node, node::RemoteOp part, node::RemoteOutcome outcome, Nanos now) override;

 private:
  struct Read {
    node::RemoteRead asked;
    std::uint32_t done = 0;     // blocks that came
    std::size_t source = 0;     // that is asked now,
    std::uint32_t ordered = 0;  // for so many
    std::uint32_t begun = 0;    // of those done, before that
    node::RemoteOp part = 0;    // its number there
    std::vector<bool> failed;   // sources
    bool canceled = false;

    std::uint32_t wanted() const { return static_cast<std::uint32_t>(asked.host_offsets.size()); }
  };
  struct Best {
    std::size_t source = 0;    // to be asked first,
    std::uint32_t blocks = 0;  // for so many
    std::size_t last = 0;      // for the end of what is found
    node::RemoteFound found;   // in all
  };

  std::optional<Best> best(node::SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                           const std::vector<bool>& without, double block_nanos, Nanos now);
  void ask(Read& read, std::size_t source, std::uint32_t blocks);

  std::vector<node::RemotePort*> sources_;
  std::map<node::SpaceNumber, std::uint64_t> slot_bytes_;
  std::map<node::RemoteOp, Read> reads_;
  std::map<node::RemoteOp, node::RemoteOp> parts_;  // of which read
  node::RemoteOp next_part_ = 1;
};

}  // namespace flexkv::server
