#include "flexkv/server/read_choice.h"

#include <algorithm>

#include "flexkv/base/assert.h"

namespace flexkv::server {
namespace {

// Estimates are no better: who is so much slower is as good, and a second place has to save so much.
constexpr double kDoubt = 1.1;

}  // namespace

ReadChoice choose_read(std::span<const ReadPlace> places, double block_worth) {
  FLEXKV_ASSERT(!places.empty());
  std::uint32_t most = 0;
  for (const ReadPlace& place : places) most = std::max(most, place.blocks);
  const auto missing = [&](std::uint32_t blocks) { return (most - blocks) * block_worth; };
  const auto may_end = [&](const ReadPlace& place) { return block_worth > 0 || place.blocks == most; };
  const auto alone = [&](const ReadPlace& place) {
    return place.wait + place.blocks * place.per_block + missing(place.blocks);
  };

  double least = 0;
  bool any = false;
  for (const ReadPlace& place : places) {
    if (!may_end(place) || (any && least <= alone(place))) continue;
    least = alone(place);
    any = true;
  }
  std::optional<std::size_t> one;
  for (std::size_t i = 0; i < places.size(); ++i) {
    const ReadPlace& place = places[i];
    if (!may_end(place) || alone(place) > least * kDoubt) continue;
    if (one && place.blocks < places[*one].blocks) continue;
    if (!one || place.blocks > places[*one].blocks || place.order < places[*one].order) one = i;
  }
  ReadChoice choice{*one, std::nullopt, places[*one].blocks, places[*one].wait,
                    places[*one].blocks * places[*one].per_block};

  // Much from who is fast, and the rest from who has more.
  double bound = least / kDoubt;
  for (std::size_t i = 0; i < places.size(); ++i) {
    const ReadPlace& first = places[i];
    const double there = first.wait + first.blocks * first.per_block;
    if (there >= bound) continue;
    for (std::size_t k = 0; k < places.size(); ++k) {
      const ReadPlace& then = places[k];
      if (then.blocks <= first.blocks || !may_end(then)) continue;
      const double reading = first.blocks * first.per_block + (then.blocks - first.blocks) * then.per_block;
      const double cost = first.wait + then.wait + reading + missing(then.blocks);
      if (cost >= bound) continue;
      bound = cost;
      choice = {i, k, then.blocks, first.wait + then.wait, reading};
    }
  }
  return choice;
}

}  // namespace flexkv::server
