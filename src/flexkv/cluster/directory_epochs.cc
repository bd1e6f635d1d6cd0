// Which epoch a node is in, what it makes of the one that it finds in the store, and resets (docs/decisions/0033).
#include <algorithm>
#include <string>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/prng.h"
#include "flexkv/cluster/directory.h"
#include "flexkv/cluster/look.h"

namespace flexkv::cluster {
namespace {

// Of those that were asked for, for who asks what became of his.
constexpr std::size_t kResetsRemembered = 64;

// So long the store remembers a reset that nobody alive is of. Who comes back after that has everybody forget once
// more.
constexpr Nanos kResetHeard = Nanos{400} * 24 * 3600 * kSecond;

// Within that time whoever knows better has corrected a store that came back older: a connection is tried again after
// 4 s at most, and takes 2 s, as an answer does (meta/redis_channel.h).
constexpr Nanos kCorrected = 10 * kSecond;

}  // namespace

void Directory::enter_epoch(Nanos now) {
  FLEXKV_ASSERT(epoch_to_enter_.has_value() && order_ == Order::kNone);
  epoch_ = *std::exchange(epoch_to_enter_, std::nullopt);
  names_.set_epoch(epoch_);
  for (Space& space : spaces_) space.publisher.move_to(places(space.id), now);
  replica_.remove_all();
  peers_.clear();
  joined_ = looked_ = current_ = false;
  seen_since_.reset();
  ring_ = true;
  round_due_ = now;
}

std::optional<Epoch> Directory::current_epoch() const {
  if (!current_ || epoch_.reset == 0 || epoch_to_enter_ || reset_wanted()) return std::nullopt;
  return epoch_;
}

void Directory::reset_cluster(ResetId reset, Nanos now) {
  want_reset(reset);
  want_round(now);
}

void Directory::want_reset(ResetId reset) {
  ++resets_asked_;
  reset_asked_ = reset;
  if (wanted_resets_.size() == kResetsRemembered) wanted_resets_.erase(wanted_resets_.begin());
  wanted_resets_.push_back(reset);
}

void Directory::want_own_reset() {
  want_reset(std::max(Prng::mix(Prng::mix(options_.incarnation) + resets_asked_), ResetId{1}));
}

void Directory::note_resets_told() {
  told_resets_.insert(told_resets_.end(), wanted_resets_.begin(), wanted_resets_.end());
  wanted_resets_.clear();
  if (told_resets_.size() <= kResetsRemembered) return;
  told_resets_.erase(told_resets_.begin(), told_resets_.end() - std::ptrdiff_t{kResetsRemembered});
}

// docs/decisions/0033 has the table of cases.
void Directory::note_epoch(const meta::Answers& answers) {
  store_epoch_ = {parse_number(answers[0].value).value_or(0), 0};
  ResetId reset = 0;
  if (answers[1].found && parse_hex(answers[1].value, reset)) store_epoch_.reset = reset;
  // Only what the store shows has happened: it may have lost what it has taken. Heard of comes last (add_reset()).
  const bool heard = answers[kHeardWanted].found && reset_looked_for_ == reset_asked_;
  if (reset_wanted() && (store_epoch_.reset == reset_asked_ || heard)) note_resets_told();
  if (store_epoch_ != epoch_) {
    seen_since_.reset();
  } else if (!seen_since_) {
    seen_since_ = round_begun_;
  }
  current_ = seen_since_ && round_begun_ - *seen_since_ >= std::max(beat_gap(), kCorrected);
  if (options_.needs_reset && store_epoch_.reset == 0 && epoch_.reset == 0 && !reset_wanted()) want_own_reset();
  // It has begun anew, and there was no reset since: what this node knows holds.
  if (store_epoch_.number == 0 && store_epoch_.reset == 0) return;
  // A lower number of the same reset has been lost. A higher one is of a reset whose id has been.
  const bool lower = store_epoch_.reset != 0 && store_epoch_.number < epoch_.number;
  if (store_epoch_.reset == epoch_.reset && (lower || store_epoch_.number == epoch_.number)) return;
  // There was a reset that this node does not know. If the store does not know this node's either, as it has lost it
  // meanwhile, others may hold what that one was to make them forget.
  if (epoch_.reset != 0 && !answers[2].found && !reset_wanted()) want_own_reset();
  epoch_to_enter_ = store_epoch_;
  replica_.remove_all();
  peers_.clear();
}

// What the store has lost of this node's epoch, and a reset that is wanted.
void Directory::add_epoch(meta::Request& request) const {
  const std::string number = std::to_string(epoch_.number);
  const bool anew = store_epoch_ == Epoch{};
  if (anew) request.push_back(meta::put_if_absent(names_.epoch(), number, 0));
  if (store_epoch_.number < epoch_.number) request.push_back(meta::put(names_.epoch(), number, 0));
  if (epoch_.reset != 0) {
    if (anew) request.push_back(meta::put_if_absent(names_.reset(), hex(epoch_.reset), 0));
    // Not before it is seen there. Whose own lost against another node's, when several gave back what was lost, would
    // take its own word for the store's that the other one's is later.
    if (store_epoch_.reset == epoch_.reset) request.push_back(meta::put(names_.heard(epoch_.reset), "1", kResetHeard));
  }
  if (reset_wanted()) add_reset(request);
}

void Directory::add_reset(meta::Request& request) const {
  request.push_back(meta::increment(names_.epoch()));
  request.push_back(meta::put(names_.reset(), hex(reset_asked_), 0));
  request.push_back(meta::put(names_.heard(reset_asked_), "1", kResetHeard));
}

}  // namespace flexkv::cluster
