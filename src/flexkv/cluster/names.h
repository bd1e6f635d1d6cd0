// The names of the directory's keys in Redis. All begin with the cluster's; all but those of resets name the epoch, so
// that what was before a reset of the cluster is not found after it, and goes by its time to live.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "flexkv/cluster/types.h"

namespace flexkv::cluster {

std::string hex(Incarnation incarnation);                            // 16 digits
bool parse_hex(const std::string& text, Incarnation& out);           // false: not that, or 0
std::optional<std::uint64_t> parse_number(const std::string& text);  // decimal; none: not that

class Names {
 public:
  explicit Names(const std::string& cluster) : cluster_("flexkv:" + cluster + ":") { set_epoch({}); }
  void set_epoch(const Epoch& epoch);

  std::string epoch() const { return cluster_ + "epoch"; }  // a number
  std::string reset() const { return cluster_ + "reset"; }  // the id of the latest one
  // Is there if the store has heard of that reset.
  std::string heard(ResetId reset) const { return cluster_ + "heard:" + hex(reset); }
  std::string nodes() const { return epoch_ + "nodes"; }  // a set of incarnations
  std::string bell() const { return epoch_ + "bell"; }    // a stream: whoever hears it reads all heartbeats
  std::string beat(Incarnation node) const { return epoch_ + "node:" + hex(node); }
  std::string stream(const SpaceId& space, Incarnation node) const { return place(space, node) + "stream"; }
  std::string ask(const SpaceId& space, Incarnation node) const { return place(space, node) + "ask"; }
  // To which the generation is added: one key with all parts of that snapshot.
  std::string snapshot(const SpaceId& space, Incarnation node) const { return place(space, node) + "snapshot:"; }

 private:
  std::string place(const SpaceId& space, Incarnation node) const;

  const std::string cluster_;
  std::string epoch_;
};

}  // namespace flexkv::cluster
