// Whether a store does what a node needs of it, for who looks for faults. Thread-compatible.
#pragma once

#include <string>
#include <vector>

#include "flexkv/remote/store.h"

namespace flexkv::remote {

struct ProbeStep {
  std::string what;  // "list", "write", "read"
  Nanos took = 0;
  std::string why;  // it failed; empty: it did not
};

// Lists, then writes and reads the object that nodes write when they look whether a store is back, within `within`
// each. It stays: nodes remove nothing and need no right to.
// REQUIRES: nothing is under way in the store
std::vector<ProbeStep> probe_store(Store& store, Nanos within);

}  // namespace flexkv::remote
