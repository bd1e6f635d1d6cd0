// What the store has of one space, as far as is known: which block lies where in which object. Pure logic;
// thread-compatible. About 110 bytes a block.
#pragma once

#include <map>
#include <set>
#include <unordered_map>

#include "flexkv/remote/object.h"

namespace flexkv::remote {

class Catalog {
 public:
  // Of all spaces together, and shared by their catalogs.
  struct Room {
    std::uint64_t blocks_left = 0;
    std::uint64_t left_out = 0;  // objects that found none
  };
  struct Place {
    ObjectName object;
    std::uint32_t index = 0;  // of the block in it
  };

  // `room` outlives the catalog.
  explicit Catalog(Room& room) : room_(room) {}
  ~Catalog();
  Catalog(const Catalog&) = delete;
  Catalog& operator=(const Catalog&) = delete;

  std::size_t leading(std::span<const key::BlockKey> keys) const;
  bool contains(const key::BlockKey& key) const { return places_.contains(key); }
  std::optional<Place> find(const key::BlockKey& key) const;

  // Nothing changes when it is known already, or without room. A block that several objects have is looked for in the
  // first one that is known.
  void add(const ObjectName& name, Chain chain);
  // It is gone: blocks that another object has as well are found there.
  void forget(const ObjectName& name);
  // It is damaged: forgotten, and not to be believed until written anew.
  void condemn(const ObjectName& name);
  bool condemned(const ObjectName& name) const { return condemned_.contains(name); }
  // What was condemned is good again.
  void pardon(const ObjectName& name) { condemned_.erase(name); }

  // A scan: between both calls all that is there is to be seen, or added; what is neither is forgotten.
  void begin_scan();
  // Whether the object's header has to be read, as it is not known yet.
  bool see(const ObjectName& name);
  // At the end, until it answers true: looks at some of the objects, so that others have their turn between two calls.
  bool sweep();

  std::uint64_t objects() const { return objects_.size(); }
  std::uint64_t blocks() const { return places_.size(); }

 private:
  struct Object {
    Chain chain;
    std::uint64_t seen_in = 0;  // number of the scan
  };
  using Objects = std::map<ObjectName, Object>;
  struct Where {
    const Objects::value_type* object;
    std::uint32_t index;
  };

  void point_to(Objects::value_type& object);
  void erase(Objects::iterator object);
  void uncover();

  Room& room_;
  Objects objects_;
  std::unordered_map<key::BlockKey, Where, key::BlockKeyHash> places_;
  std::set<ObjectName> shadowed_;  // others are looked at for some of their blocks
  std::set<ObjectName> condemned_;
  std::uint64_t scan_ = 0;
  std::optional<ObjectName> swept_;  // up to here
};

}  // namespace flexkv::remote
