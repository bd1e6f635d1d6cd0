// The seam to what keeps objects: named byte strings, written whole and never changed, read in part.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "flexkv/remote/types.h"

namespace flexkv::remote {

using OpId = std::uint64_t;

enum class StoreOutcome : std::uint8_t {
  kDone,
  kMissing,  // no such object
  kShort,    // it has fewer bytes than asked for
  kRefused,  // trying again will not help: no permission, no such bucket
  kFailed,
  kUnavailable,  // it was not asked (a Store never says so)
};

// 16 zeros, which are written and read to find out whether the store serves.
inline constexpr const char* kProbePath = "v1/probe";

// Of the parts of an operation together.
template <typename Part>
std::uint64_t bytes_of(const std::vector<std::span<Part>>& parts) {
  std::uint64_t bytes = 0;
  for (const auto part : parts) bytes += part.size();
  return bytes;
}

// What it writes or reads lies there until it has ended or is abandoned, and so do the spans' bytes.
struct PutOp {
  std::string path;
  std::vector<std::span<const std::byte>> parts;
  // What is there may be bad. Otherwise a store may leave as it is what it has by that name: that holds the same.
  bool replace = false;
};
struct GetOp {
  std::string path;
  std::uint64_t offset = 0;
  std::vector<std::span<std::byte>> parts;  // filled whole, or the outcome is not kDone
};
// A page of what begins with `folder`, which ends with '/'.
struct ListOp {
  std::string folder;
  std::string from;  // Ended::next of the page before; empty: the first one
};

struct ListedObject {
  std::string path;
  std::optional<std::uint64_t> bytes;  // none: the store does not tell
};

struct Ended {
  OpId id = 0;
  StoreOutcome outcome = StoreOutcome::kDone;
  std::string why;                    // unless kDone; without secrets
  std::vector<ListedObject> objects;  // of a ListOp
  std::string next;                   // of a ListOp; empty: that was the last page
};

// One thread (the tier's lane) calls all of it but wake(). No call but wait() blocks.
class Store {
 public:
  virtual ~Store() = default;

  // How many operations it carries out at once; with more under way, some only wait.
  virtual unsigned width() const = 0;
  // Whether what is written stays until somebody removes it. Marks of resets are kept in no other.
  virtual bool keeps() const { return true; }
  // It ends once, by wait(), unless abandoned.
  virtual void begin(OpId id, PutOp op) = 0;
  virtual void begin(OpId id, GetOp op) = 0;
  virtual void begin(OpId id, ListOp op) = 0;
  // From now on none of its bytes are touched, and it does not end any more, if it has not yet. What it writes may come
  // to be, whole.
  virtual void abandon(OpId id) = 0;

  // Waits for ends, for wake() or until then; nothing: as long as it takes.
  virtual void wait(std::optional<Nanos> until, std::vector<Ended>& ended) = 0;
  virtual void wake() = 0;  // thread-safe
};

}  // namespace flexkv::remote
