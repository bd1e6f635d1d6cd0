// The SSD tier on real files that are damaged, swapped or not its own: it opens, says what it leaves out and why,
// serves nothing wrong and all that is intact.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include "flexkv/disk/check.h"
#include "flexkv/disk/tier.h"
#include "flexkv/file/open_drive.h"

namespace flexkv::disk {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kSlotBytes = 4096;
constexpr SpaceId kModel{1};
constexpr SpaceId kOtherModel{2};
constexpr unsigned kDrives = 2;
constexpr std::uint32_t kBlocks = 8;  // block i lies in slot i; 2, 3, 6 and 7 follow the one before on their drive

key::BlockKey key_of(std::uint32_t block) { return {7, block + 1}; }
key::BlockKey parent_of(std::uint32_t block) { return block % 4 < 2 ? kNoParent : key_of(block - kDrives); }

struct Page {
  alignas(4096) std::byte bytes[2 * kSlotBytes];
};
// What a model computes for a block.
void fill(Page& page, const SpaceId& model, std::uint32_t block) {
  std::memset(page.bytes, static_cast<int>(16 * model[0] + block), sizeof page.bytes);
}

using Blocks = std::set<std::uint32_t>;

// A node's tier with its directories, and one model open.
class Node final : public TierSink {
 public:
  // `unseen`: as if the files had come after the node looked at the directories.
  Node(const std::vector<std::string>& directories, const SpaceId& model, std::uint64_t slot_bytes = kSlotBytes,
       bool unseen = false)
      : model_(model), slot_bytes_(slot_bytes), health_(directories.size()) {
    auto home = Home::open(directories);
    if (!home) throw std::runtime_error(home.error().message);
    home_ = std::move(home).value();
    std::vector<VolumeSpec> volumes;
    for (const Home::Place& place : home_.places) {
      file::DriveOptions drive;
      drive.directory = place.path;
      volumes.push_back({place.path, unseen ? "" : place.why_not, place.found,
                         [drive](file::DriveSink& sink) { return file::open_drive(drive, sink); }});
    }
    TierOptions options;
    options.bytes_max = 4 << 20;
    tier_ = std::make_unique<DiskTier>(options, volumes, *this);
    tier_->open_space(kSpace, model, slot_bytes);
    wait([&] { return opened_.has_value(); });
  }
  // Waits for what it still writes: records of blocks that were found to be damaged.
  ~Node() override { EXPECT_TRUE(tier_->close(10 * kSecond)); }

  const Opened& opened() const { return *opened_; }
  std::string health(unsigned drive) {
    std::lock_guard lock(mutex_);
    return health_[drive];
  }
  std::uint64_t checksum_failures() const {
    std::uint64_t failures = 0;
    for (const VolumeStats& volume : tier_->stats()) failures += volume.checksum_failures;
    return failures;
  }

  void write_all() {
    Page page;
    for (std::uint32_t block = 0; block < kBlocks; ++block) {
      fill(page, model_, block);
      EXPECT_EQ(tier_->write({next_op_, kSpace, block, key_of(block), parent_of(block), bytes(page)}),
                Admission::kQueued);
      EXPECT_EQ(end_of(next_op_++), Outcome::kDone);
    }
  }
  // Reads all that was found. What is served must be what the model has computed for that block.
  Blocks served() {
    Blocks served;
    Page page;
    Page right;
    for (std::uint32_t block = 0; block < kBlocks; ++block) {
      const auto found = slots_.find(key_of(block).low);
      if (found == slots_.end()) continue;
      EXPECT_EQ(tier_->read({next_op_, kSpace, found->second, key_of(block), bytes(page)}), Admission::kQueued);
      const Outcome outcome = end_of(next_op_++);
      if (outcome == Outcome::kChecksum) continue;
      EXPECT_EQ(outcome, Outcome::kDone);
      fill(right, model_, block);
      EXPECT_EQ(std::memcmp(page.bytes, right.bytes, slot_bytes_), 0) << block;
      served.insert(block);
    }
    return served;
  }

  void on_completions(std::span<const Completion> completions) override {
    tell([&] {
      for (const Completion& completion : completions) ended_[completion.id] = completion.outcome;
    });
  }
  void on_overdue(OpId) override {}
  void on_recovered(SpaceHandle, std::span<const Chain> chains) override {
    for (const Chain& chain : chains) {
      for (std::size_t i = 0; i < chain.keys.size(); ++i) slots_[chain.keys[i].low] = chain.slots[i];
    }
  }
  void on_opened(SpaceHandle, const Opened& opened) override {
    tell([&] { opened_ = opened; });
  }
  void on_health(unsigned drive, const Health& health) override {
    tell([&] { health_[drive] = health.why; });
  }

 private:
  static constexpr SpaceHandle kSpace{1};

  std::span<std::byte> bytes(Page& page) const { return std::span(page.bytes).first(slot_bytes_); }
  Outcome end_of(OpId id) {
    wait([&] { return ended_.contains(id); });
    return ended_[id];
  }
  template <typename Change>
  void tell(Change change) {
    {
      std::lock_guard lock(mutex_);
      change();
    }
    told_.notify_all();
  }
  template <typename Condition>
  void wait(Condition condition) {
    std::unique_lock lock(mutex_);
    told_.wait(lock, condition);
  }

  const SpaceId model_;
  const std::uint64_t slot_bytes_;
  Home home_;
  std::mutex mutex_;
  std::condition_variable told_;
  std::vector<std::string> health_;
  std::optional<Opened> opened_;
  std::map<std::uint64_t, std::uint32_t> slots_;  // by the low half of the key
  std::map<OpId, Outcome> ended_;
  OpId next_op_ = 1;
  std::unique_ptr<DiskTier> tier_;  // the last: its threads call the sink
};

// Two drives with all blocks of two models, as a node leaves them that has ended.
class ForeignStore : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string root = (fs::temp_directory_path() / "flexkv-foreign-XXXXXX").string();
    ASSERT_NE(::mkdtemp(root.data()), nullptr);
    root_ = root;
    drives_ = {root + "/a", root + "/b"};
    for (const SpaceId& model : {kModel, kOtherModel}) Node(drives_, model).write_all();
  }
  void TearDown() override { fs::remove_all(root_); }

  std::string records(unsigned drive, const SpaceId& model = kModel) const {
    return drives_[drive] + "/" + space_name(model) + ".records";
  }
  std::string blocks(unsigned drive, const SpaceId& model = kModel) const {
    return drives_[drive] + "/" + space_name(model) + ".blocks";
  }
  static std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  static void write(const std::string& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
  }
  static void overwrite(const std::string& path, std::uint64_t offset, const std::string& bytes) {
    std::fstream(path, std::ios::binary | std::ios::in | std::ios::out).seekp(static_cast<std::streamoff>(offset))
        << bytes;
  }
  static std::string noise(std::size_t bytes) {
    std::string text(bytes, '\0');
    std::ifstream("/dev/urandom", std::ios::binary).read(text.data(), static_cast<std::streamsize>(bytes));
    return text;
  }

  struct Slot {
    std::uint32_t block;
    SpaceId model = kModel;
  };
  void swap(const std::string& first, std::uint64_t first_at, const std::string& second, std::uint64_t second_at,
            std::size_t size) const {
    const std::string one = read(first).substr(first_at, size);
    overwrite(first, first_at, read(second).substr(second_at, size));
    overwrite(second, second_at, one);
  }
  void swap_payloads(const Slot& a, const Slot& b) const {
    swap(blocks(a.block % kDrives, a.model), a.block / kDrives * kSlotBytes, blocks(b.block % kDrives, b.model),
         b.block / kDrives * kSlotBytes, kSlotBytes);
  }
  void swap_records(const Slot& a, const Slot& b) const {
    swap(records(a.block % kDrives, a.model), kHeaderBytes + a.block / kDrives * kRecordBytes,
         records(b.block % kDrives, b.model), kHeaderBytes + b.block / kDrives * kRecordBytes, kRecordBytes);
  }

  // What a node finds and serves of a model.
  struct Seen {
    Blocks served;
    Discarded discarded;
    std::vector<std::string> dropped;
    std::uint64_t checksum_failures;
  };
  Seen open(const SpaceId& model = kModel, std::uint64_t slot_bytes = kSlotBytes) const {
    Node node(drives_, model, slot_bytes);
    Blocks served = node.served();
    return {std::move(served), node.opened().discarded, node.opened().dropped_files, node.checksum_failures()};
  }
  std::string dropped(unsigned drive, const std::string& why) const {
    return drives_[drive] + ": old blocks are not used: " + why;
  }

  const Blocks all_{0, 1, 2, 3, 4, 5, 6, 7};
  const Blocks on_first_{0, 2, 4, 6};
  const Blocks on_second_{1, 3, 5, 7};
  const std::vector<std::string> nothing_;
  std::string root_;
  std::vector<std::string> drives_;
};

TEST_F(ForeignStore, WhatIsIntactIsServed) {
  for (const SpaceId& model : {kModel, kOtherModel}) {
    const Seen seen = open(model);
    EXPECT_EQ(seen.served, all_);
    EXPECT_EQ(describe(seen.discarded), "none");
    EXPECT_EQ(seen.dropped, nothing_);
  }
}

TEST_F(ForeignStore, ADirectoryOfAnotherVersionIsLeftAsItIsUntilItIsCleared) {
  overwrite(records(0), 8, std::string("\2\0\0\0", 4));
  const std::string before = read(records(0)) + read(blocks(0)) + read(records(0, kOtherModel));
  // Found at the start; and by the space, if the file came later.
  for (const bool unseen : {false, true}) {
    Node node(drives_, kModel, kSlotBytes, unseen);
    EXPECT_EQ(node.served(), on_second_);
    EXPECT_EQ(node.opened().slots[0], 0U);
    if (!unseen) {
      EXPECT_EQ(node.health(0), version_refusal(records(0)));
    }
  }
  EXPECT_EQ(open(kOtherModel).served, on_second_);
  EXPECT_EQ(read(records(0)) + read(blocks(0)) + read(records(0, kOtherModel)), before);
  const auto report = check(drives_[0], 0, [](auto, auto) {});
  ASSERT_TRUE(report.ok()) << report.error().message;
  EXPECT_EQ(report.value().problems, std::vector{version_refusal(space_name(kModel) + ".records")});

  ASSERT_TRUE(clear(drives_[0]).ok());
  Node node(drives_, kModel);
  EXPECT_EQ(node.health(0), "");
  EXPECT_GT(node.opened().slots[0], 0U);
}

TEST_F(ForeignStore, ACheckReadsNoFasterThanItMay) {
  constexpr std::uint64_t kRate = 3 * kSlotBytes;  // a second
  Nanos now = 5 * kSecond;
  Nanos slept = 0;
  const CheckClock clock{[&] { return now; },
                         [&](Nanos time) {
                           now += time;
                           slept += time;
                         }};
  std::vector<std::uint64_t> seen;
  const auto progress = [&](std::uint64_t done, std::uint64_t) {
    seen.push_back(done);
    // But for less than a nanosecond.
    EXPECT_LE(static_cast<double>(done) / kRate * kSecond, static_cast<double>(now - 5 * kSecond) + 1);
  };
  ASSERT_EQ(check(drives_[0], kRate, progress, clock).value().blocks, 8U);  // of both models
  EXPECT_EQ(seen.size(), 8U);
  EXPECT_NEAR(static_cast<double>(slept), 8.0 / 3 * kSecond, 10);
  slept = 0;
  ASSERT_EQ(check(
                drives_[0], 0, [](auto, auto) {}, clock)
                .value()
                .blocks,
            8U);
  EXPECT_EQ(slept, 0) << "no rate, no rest";
  const CheckClock slow{[&] { return now += kSecond; }, clock.sleep};
  ASSERT_EQ(check(
                drives_[0], kRate, [](auto, auto) {}, slow)
                .value()
                .blocks,
            8U);
  EXPECT_EQ(slept, 0) << "a drive that is slower by itself is not slowed down";
}

TEST_F(ForeignStore, FilesOfAnotherModelUnderOurNameAreDropped) {
  fs::rename(records(0, kOtherModel), records(0));
  fs::rename(blocks(0, kOtherModel), blocks(0));
  const Seen seen = open();
  EXPECT_EQ(seen.served, on_second_);
  EXPECT_EQ(seen.dropped, std::vector{dropped(0, "another model or layout")});
  EXPECT_EQ(open(kOtherModel).served, on_second_);
}

TEST_F(ForeignStore, SlotsOfAnotherSizeAreDropped) {
  const Seen seen = open(kModel, 2 * kSlotBytes);
  EXPECT_EQ(seen.served, Blocks{});
  EXPECT_EQ(seen.dropped, (std::vector{dropped(0, "another slot size"), dropped(1, "another slot size")}));
  EXPECT_EQ(open(kOtherModel).served, all_);
}

TEST_F(ForeignStore, RandomBytesAreDropped) {
  write(records(0), noise(3 * kHeaderBytes + 17));
  write(blocks(0), noise(64 << 10));
  const Seen seen = open();
  EXPECT_EQ(seen.served, on_second_);
  EXPECT_EQ(seen.dropped, std::vector{dropped(0, "damaged header")});
  EXPECT_EQ(open(kOtherModel).served, all_);
}

TEST_F(ForeignStore, RandomBytesBehindAHeaderAreDamagedRecords) {
  const std::size_t size = kBlocks / kDrives * kRecordBytes;
  overwrite(records(0), kHeaderBytes, noise(size));
  const Seen seen = open();
  EXPECT_EQ(seen.served, on_second_);
  EXPECT_EQ(seen.discarded, Discarded{.damaged = kBlocks / kDrives});
}

TEST_F(ForeignStore, RandomBytesInPlaceOfBlocksAreNotServed) {
  overwrite(blocks(0), 0, noise(kBlocks / kDrives * kSlotBytes));
  testing::internal::CaptureStderr();
  const Seen seen = open();
  const std::string log = testing::internal::GetCapturedStderr();
  const std::string line = drives_[0] + ": a block is not what its record says";
  EXPECT_NE(log.find(line), std::string::npos) << log;
  EXPECT_EQ(log.find(line), log.rfind(line)) << "once is enough: " << log;
  EXPECT_EQ(seen.served, on_second_);
  EXPECT_EQ(seen.checksum_failures, kBlocks / kDrives);
  // They are not found again.
  const Seen again = open();
  EXPECT_EQ(again.served, on_second_);
  EXPECT_EQ(again.checksum_failures, 0U);
}

TEST_F(ForeignStore, ShortFilesServeWhatTheyStillHave) {
  fs::resize_file(blocks(0), 2 * kSlotBytes + 100);
  fs::resize_file(records(1), kHeaderBytes + kRecordBytes + 5);
  EXPECT_EQ(open().served, (Blocks{0, 2, 1}));
}

TEST_F(ForeignStore, SwappedPayloadsAreNotServed) {
  for (const auto& [what, a, b] :
       {std::tuple("slots of one file", Slot{0}, Slot{4}), std::tuple("files of two drives", Slot{2}, Slot{3}),
        std::tuple("two models", Slot{6}, Slot{6, kOtherModel})}) {
    SCOPED_TRACE(what);
    swap_payloads(a, b);
    const Seen seen = open();
    Blocks intact = all_;
    intact.erase(a.block);
    if (b.model == kModel) intact.erase(b.block);
    EXPECT_EQ(seen.served, intact);
    EXPECT_EQ(seen.checksum_failures, all_.size() - intact.size());
    if (b.model != kModel) {
      EXPECT_EQ(open(b.model).served, intact);
    }
    for (const SpaceId& model : {kModel, kOtherModel}) Node(drives_, model).write_all();
  }
}

TEST_F(ForeignStore, RecordsOfAnotherPlaceOrModelAreDamaged) {
  swap_records({0}, {4});
  Seen seen = open();
  EXPECT_EQ(seen.served, on_second_);
  EXPECT_EQ(describe(seen.discarded), "2 damaged, 2 without the block before");
  swap_records({1}, {1, kOtherModel});
  seen = open();
  EXPECT_EQ(seen.served, (Blocks{5, 7}));
  EXPECT_EQ(describe(seen.discarded), "3 damaged, 3 without the block before");
  seen = open(kOtherModel);
  EXPECT_EQ(seen.served, (Blocks{0, 2, 4, 5, 6, 7}));
  EXPECT_EQ(describe(seen.discarded), "1 damaged, 1 without the block before");
}

// A record says which block it is, not on which drive: moved whole, blocks are right where they lie now.
TEST_F(ForeignStore, BlocksMovedToAnotherDriveWithTheirRecordsAreServed) {
  swap_payloads({0}, {1});
  swap_records({0}, {1});
  EXPECT_EQ(open().served, all_);
  std::swap(drives_[0], drives_[1]);
  const Seen seen = open();
  EXPECT_EQ(seen.served, all_);
  EXPECT_EQ(seen.dropped, nothing_);
}

}  // namespace
}  // namespace flexkv::disk
