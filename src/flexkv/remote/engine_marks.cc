// How the engine learns of resets, and tells others of them: marks are objects whose names say all. A set of them only
// ever grows, so nodes that do not know of each other agree in the end whatever they did at once.
#include <cstdio>
#include <cstring>
#include <utility>

#include "flexkv/remote/engine.h"

namespace flexkv::remote {
namespace {

constexpr std::string_view kFolder = "v1/resets/";

std::string path_of(const Mark& mark) {
  std::string hex;
  for (const std::uint8_t byte : mark) {
    std::array<char, 3> digits{};
    std::snprintf(digits.data(), digits.size(), "%02x", byte);
    hex += digits.data();
  }
  return std::string(kFolder) + hex.substr(0, 2) + '/' + hex;
}

// Nothing when it is no mark's.
std::optional<Mark> parse_path(const std::string& path) {
  constexpr std::size_t kName = kFolder.size() + 3;
  Mark mark{};
  if (path.size() != kName + 2 * mark.size()) return {};
  for (std::size_t i = 0; i < mark.size(); ++i) {
    unsigned byte = 0;
    if (std::sscanf(path.c_str() + kName + 2 * i, "%2x", &byte) != 1) return {};
    mark[i] = static_cast<std::uint8_t>(byte);
  }
  if (path_of(mark) != path) return {};
  return mark;
}

}  // namespace

void Engine::watch_marks(Nanos now) {
  if (marks_) return;
  marks_.emplace(options_);
  marks_->due = now;
}

void Engine::put_mark(const Mark& mark, Nanos now) {
  if (!marks_->known.insert(mark).second) return;
  marks_->unstored.insert(mark);
  marks_->due = now;  // others may have put some, too
}

void Engine::look_for_marks() {
  marks_->listing.clear();
  list_marks("");
}

void Engine::list_marks(std::string from) {
  const auto make = [from]() -> Dispatch::StoreOp { return ListOp{std::string(kFolder), from}; };
  marks_->ops.insert(dispatch_.order(Dispatch::Kind::kScan, make, [this, from = std::move(from)](Ended& ended) {
    marks_->ops.erase(ended.id);
    const bool goes_on = ended.next.empty() || ended.next > from;
    if (ended.outcome != StoreOutcome::kDone) return end_looking(ended.why);
    if (!goes_on) return end_looking("it lists the same page again and again");
    for (const ListedObject& object : ended.objects) {
      if (const auto mark = parse_path(object.path)) marks_->listing.insert(*mark);
    }
    if (ended.next.empty()) {
      take_marks();
    } else {
      list_marks(std::move(ended.next));
    }
  }));
}

void Engine::take_marks() {
  Marks& marks = *marks_;
  const std::size_t before = marks.known.size();
  // What somebody has removed is put again: who comes later must know it, too.
  for (const Mark& mark : marks.known) {
    marks.listing.contains(mark) ? void(marks.unstored.erase(mark)) : void(marks.unstored.insert(mark));
  }
  marks.known.insert(marks.listing.begin(), marks.listing.end());
  const bool more = !std::exchange(marks.listed, true) || marks.known.size() > before;
  end_looking("");
  store_marks();
  // Whether it can be written to is known, and told, before the first block is.
  try_writing(kProbePath, std::vector<std::byte>(16), [] {});
  publish();
  if (more) sink_.on_marks(marks.known);
}

void Engine::store_marks() {
  for (const Mark& mark : marks_->unstored) {
    std::vector<std::byte> bytes(mark.size());
    std::memcpy(bytes.data(), mark.data(), mark.size());
    try_writing(path_of(mark), std::move(bytes), [this, mark] { marks_->unstored.erase(mark); });
  }
}

void Engine::try_writing(std::string path, std::vector<std::byte> bytes, std::function<void()> done) {
  const auto kept = std::make_shared<std::vector<std::byte>>(std::move(bytes));
  const auto make = [path = std::move(path), kept]() -> Dispatch::StoreOp { return PutOp{path, {std::span(*kept)}}; };
  marks_->ops.insert(dispatch_.order(Dispatch::Kind::kWrite, make, [this, kept, done](Ended& ended) {
    marks_->ops.erase(ended.id);
    if (ended.outcome == StoreOutcome::kDone) {
      marks_->why_unwritten.clear();
      done();
    } else {
      marks_->why_unwritten = ended.why;
      if (!marks_->unstored.empty()) marks_->due = now_ + marks_->backoff.failed();
    }
    publish();
  }));
}

// Empty: it went well.
void Engine::end_looking(std::string why) {
  marks_->why_unread = std::move(why);
  const bool well = marks_->why_unread.empty();
  if (well && marks_->unstored.empty()) marks_->backoff.succeeded();
  marks_->due = now_ + (well ? options_.scan_every : marks_->backoff.failed());
  publish();
  if (!well && !marks_->listed) sink_.on_no_marks();
}

}  // namespace flexkv::remote
