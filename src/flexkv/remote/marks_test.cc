// Marks of resets in a store that is shared, over real files.
#include <fstream>

#include "flexkv/remote/file_store.h"
#include "flexkv/remote/test_tier.h"

namespace flexkv::remote {
namespace {

using testing::Folder;
namespace fs = std::filesystem;

class MarkSink final : public RemoteSink {
 public:
  void on_block(RequestId, std::uint32_t) override {}
  void on_end(RequestId, Outcome) override {}
  void on_written(RequestId, Outcome) override {}
  void on_marks(const std::set<Mark>& marks) override {
    const std::lock_guard lock(mutex_);
    marks_ = marks;
    ++times_;
    changed_.notify_all();
  }
  void wait_for(const std::set<Mark>& marks) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return times_ > 0 && marks_ == marks; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<Mark> marks_;
  int times_ = 0;
};

class Watcher {
 public:
  explicit Watcher(const fs::path& path) {
    TierOptions options;
    options.engine.scan_every = 20 * kMillisecond;
    options.engine.dispatch.breaker.probe_after = 20 * kMillisecond;
    tier_ = std::make_unique<RemoteTier>(options, std::make_unique<FileStore>(path.string(), 2), sink);
    tier_->watch_marks();
  }
  RemoteTier& tier() { return *tier_; }
  void wait_until_stored() {
    while (tier_->stats().marks_unstored > 0 || !tier_->stats().marks_listed) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  MarkSink sink;

 private:
  std::unique_ptr<RemoteTier> tier_;
};

constexpr Mark kOne{1, 2, 3, 0xFF};
constexpr Mark kOther{0xFF};

TEST(RemoteMarks, AllWhoShareAStoreLearnOfAll) {
  const Folder folder;
  Watcher a(folder.path());
  Watcher b(folder.path());
  a.sink.wait_for({});
  b.sink.wait_for({});
  a.tier().put_mark(kOne);
  b.tier().put_mark(kOther);
  a.sink.wait_for({kOne, kOther});
  b.sink.wait_for({kOne, kOther});
  a.wait_until_stored();
  b.wait_until_stored();
  Watcher later(folder.path());
  later.sink.wait_for({kOne, kOther});
  EXPECT_EQ(later.tier().stats().marks, 2U);
}

TEST(RemoteMarks, OneThatSomebodyRemovesIsPutAgain) {
  const Folder folder;
  Watcher a(folder.path());
  a.tier().put_mark(kOne);
  a.sink.wait_for({kOne});
  a.wait_until_stored();
  fs::remove_all(folder.path() / "v1" / "resets");
  while (!fs::exists(folder.path() / "v1" / "resets" / "01" / "010203ff000000000000000000000000")) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST(RemoteMarks, WhatIsNoMarkIsNone) {
  const Folder folder;
  const fs::path marks = folder.path() / "v1" / "resets" / "01";
  fs::create_directories(marks);
  for (const char* const name : {"010203ff", "010203ff00000000000000000000000g", "010203FF000000000000000000000000",
                                 "020203ff000000000000000000000000", "010203ff0000000000000000000000000"}) {
    std::ofstream(marks / name) << "?";
  }
  Watcher a(folder.path());
  a.sink.wait_for({});
}

TEST(RemoteMarks, OneOfAStoreThatIsAwayIsPutOnceItIsBack) {
  const Folder folder;
  const fs::path place = folder.path() / "later";
  Watcher a(place);
  a.tier().put_mark(kOne);
  while (a.tier().stats().trouble.empty()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_NE(a.tier().stats().trouble.find("is not there"), std::string::npos);
  EXPECT_EQ(a.tier().stats().marks_unstored, 1U);
  fs::create_directory(place);
  a.sink.wait_for({kOne});
  a.wait_until_stored();
  EXPECT_EQ(a.tier().stats().trouble, "");
}

}  // namespace
}  // namespace flexkv::remote
