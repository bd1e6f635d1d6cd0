#include "flexkv/remote/catalog.h"

#include <utility>

namespace flexkv::remote {
namespace {

constexpr std::size_t kCondemnedMax = 65536;  // beyond, all are tried again
constexpr std::size_t kSweptAtOnce = 256;

}  // namespace

Catalog::~Catalog() {
  for (const auto& [name, object] : objects_) room_.blocks_left += object.chain.keys.size();
}

std::size_t Catalog::leading(std::span<const key::BlockKey> keys) const {
  std::size_t count = 0;
  while (count < keys.size() && places_.contains(keys[count])) ++count;
  return count;
}

std::optional<Catalog::Place> Catalog::find(const key::BlockKey& key) const {
  const auto found = places_.find(key);
  if (found == places_.end()) return {};
  return Place{found->second.object->first, found->second.index};
}

void Catalog::add(const ObjectName& name, Chain chain) {
  if (chain.keys.size() > room_.blocks_left) {
    ++room_.left_out;
    return;
  }
  const auto [object, added] = objects_.try_emplace(name);
  object->second.seen_in = scan_;
  if (!added) return;
  room_.blocks_left -= chain.keys.size();
  object->second.chain = std::move(chain);
  point_to(*object);
}

void Catalog::point_to(Objects::value_type& object) {
  std::uint32_t index = 0;
  bool shadowed = false;
  for (const key::BlockKey& key : object.second.chain.keys) {
    const auto [place, added] = places_.try_emplace(key, Where{&object, index++});
    shadowed |= place->second.object != &object;
  }
  if (shadowed) shadowed_.insert(object.first);
}

void Catalog::erase(Objects::iterator object) {
  for (const key::BlockKey& key : object->second.chain.keys) {
    const auto place = places_.find(key);
    if (place != places_.end() && place->second.object == &*object) places_.erase(place);
  }
  room_.blocks_left += object->second.chain.keys.size();
  shadowed_.erase(object->first);
  objects_.erase(object);
}

// Blocks of objects that are gone are looked for in others.
void Catalog::uncover() {
  for (const ObjectName& name : std::exchange(shadowed_, {})) point_to(*objects_.find(name));
}

void Catalog::forget(const ObjectName& name) {
  const auto found = objects_.find(name);
  if (found == objects_.end()) return;
  erase(found);
  uncover();
}

void Catalog::condemn(const ObjectName& name) {
  forget(name);
  if (condemned_.size() >= kCondemnedMax) condemned_.clear();
  condemned_.insert(name);
}

bool Catalog::see(const ObjectName& name) {
  const auto found = objects_.find(name);
  if (found == objects_.end()) return !condemned_.contains(name);
  found->second.seen_in = scan_;
  return false;
}

void Catalog::begin_scan() {
  ++scan_;
  swept_.reset();
}

bool Catalog::sweep() {
  auto object = swept_ ? objects_.upper_bound(*swept_) : objects_.begin();
  bool any = false;
  for (std::size_t i = 0; i < kSweptAtOnce && object != objects_.end(); ++i) {
    swept_ = object->first;
    const auto next = std::next(object);
    if (object->second.seen_in != scan_) {
      erase(object);
      any = true;
    }
    object = next;
  }
  if (any) uncover();
  return object == objects_.end();
}

}  // namespace flexkv::remote
