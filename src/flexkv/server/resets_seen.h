// What is known of resets elsewhere: of the cluster and, by marks, of the remote store. Kept beside the blocks on each
// drive (docs/formats/disk.md), so that a node that was down meanwhile knows at its start that they are too old.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <set>
#include <span>
#include <string>

#include "flexkv/base/result.h"
#include "flexkv/cluster/types.h"
#include "flexkv/disk/directory.h"
#include "flexkv/key/namespace.h"
#include "flexkv/remote/types.h"

namespace flexkv::server {

key::Root hash_of_cluster(const std::string& name);
key::Root hash_of_marks(const std::set<remote::Mark>& marks);

// Nothing of before these is held. By default: there was no reset.
struct ResetsSeen {
  key::Root cluster{};   // which one; zeros: none yet
  cluster::Epoch epoch;  // of it
  key::Root marks = hash_of_marks({});

  cluster::Epoch epoch_of(const std::string& name) const {
    return cluster == hash_of_cluster(name) ? epoch : cluster::Epoch();
  }
  friend bool operator==(const ResetsSeen&, const ResetsSeen&) = default;
};

using ResetsRecord = std::array<std::byte, 120>;
ResetsRecord encode(const ResetsSeen& seen);
Result<ResetsSeen> decode_resets_seen(std::span<const std::byte> bytes);

// Of a directory that blocks lie in. A record that is not there, or not whole, says of no reset: then blocks are
// forgotten if there ever was one. Blocks.
ResetsSeen read_resets_seen(const disk::Directory& directory);
// Atomically, and durable on return. REQUIRES: it is durable, too, that older blocks are forgotten
Status write_resets_seen(const disk::Directory& directory, const ResetsSeen& seen);

}  // namespace flexkv::server
