// The tier over real files.
#include "flexkv/remote/file_store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "flexkv/base/fd.h"
#include "flexkv/remote/test_tier.h"

namespace flexkv::remote {
namespace {

using testing::Folder;
using testing::User;
namespace fs = std::filesystem;

constexpr std::size_t kSlotBytes = 64 << 10;
constexpr std::size_t kBlocksPerObject = 4;

TierOptions options() {
  TierOptions options;
  options.engine.object_bytes = kBlocksPerObject * (kSlotBytes + kHeadBytes);
  options.engine.scan_every = 50 * kMillisecond;
  options.engine.dispatch.breaker.probe_after = 20 * kMillisecond;
  return options;
}

TierOptions scanning_once() {
  TierOptions once = options();
  once.engine.scan_every = 3600 * kSecond;
  return once;
}

std::unique_ptr<Store> store_at(const fs::path& path) { return std::make_unique<FileStore>(path.string(), 4); }

TEST(FileStore, WhatOneWritesAnotherReads) {
  const Folder folder;
  User writer(store_at(folder.path()), kSlotBytes, options());
  EXPECT_EQ(writer.write(0, 10), Outcome::kDone);
  EXPECT_EQ(writer.contains(0, 12), 10U);
  EXPECT_EQ(folder.objects().size(), 3U);
  User reader(store_at(folder.path()), kSlotBytes, options());
  reader.wait_for_scan();
  EXPECT_EQ(reader.contains(0, 12), 10U);
  EXPECT_EQ(reader.read(0, 10), Outcome::kDone);
  EXPECT_EQ(reader.read(3, 6), Outcome::kDone);
  const RequestId longer = reader.begin_read(0, 12);
  EXPECT_EQ(reader.end_read(longer, 0), Outcome::kMissing);
  EXPECT_EQ(reader.sink().blocks(longer), 10U);
  EXPECT_EQ(reader.contains(1000, 1), 0U);
}

TEST(FileStore, WhatIsStoredAlreadyIsNotWrittenAgain) {
  const Folder folder;
  User user(store_at(folder.path()), kSlotBytes, options());
  EXPECT_EQ(user.write(0, 6), Outcome::kDone);
  EXPECT_EQ(user.write(0, 8), Outcome::kDone);
  EXPECT_EQ(user.tier().stats().written_blocks, 8U);
  EXPECT_EQ(user.read(0, 8), Outcome::kDone);
}

// Two that do not know of each other write the same: one object, whole at every moment.
TEST(FileStore, TwoThatWriteTheSameDoNoHarm) {
  const Folder folder;
  User one(store_at(folder.path()), kSlotBytes, options());
  User other(store_at(folder.path()), kSlotBytes, options());
  const RequestId first = one.begin_write(0, 8);
  const RequestId second = other.begin_write(0, 8);
  EXPECT_EQ(one.sink().wait(first), Outcome::kDone);
  EXPECT_EQ(other.sink().wait(second), Outcome::kDone);
  EXPECT_EQ(folder.objects().size(), 2U);
  EXPECT_EQ(one.read(0, 8), Outcome::kDone);
}

TEST(FileStore, DamagedObjectsAreMissesUntilTheyAreWrittenAnew) {
  const Folder folder;
  User user(store_at(folder.path()), kSlotBytes, options());
  ASSERT_EQ(user.write(0, 4), Outcome::kDone);
  {
    std::fstream file(folder.objects().at(0), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(ObjectCodec::header_bytes(4) + 2 * (kHeadBytes + kSlotBytes) + 1000));
    file.put('x').put('y');
  }
  const RequestId id = user.begin_read(0, 4);
  EXPECT_EQ(user.end_read(id, 0), Outcome::kDamaged);
  EXPECT_EQ(user.sink().blocks(id), 2U);
  EXPECT_EQ(user.faults(Fault::kPayload), 1U);
  user.wait_for_scan();
  EXPECT_EQ(user.contains(0, 4), 0U);  // a scan does not bring it back
  EXPECT_EQ(user.write(0, 4), Outcome::kDone);
  EXPECT_EQ(user.read(0, 4), Outcome::kDone);
}

TEST(FileStore, TruncatedAndRemovedObjectsAreMisses) {
  const Folder folder;
  User user(store_at(folder.path()), kSlotBytes, options());
  ASSERT_EQ(user.write(0, 4), Outcome::kDone);
  fs::resize_file(folder.objects().at(0), kSlotBytes * 2);
  EXPECT_EQ(user.read(0, 4), Outcome::kDamaged);
  EXPECT_EQ(user.faults(Fault::kShort), 1U);
  EXPECT_EQ(user.contains(0, 4), 0U);
  User other(store_at(folder.path()), kSlotBytes, options());
  other.wait_for_scan();
  EXPECT_EQ(other.contains(0, 4), 0U);
  EXPECT_EQ(other.faults(Fault::kShort), 1U);
  ASSERT_EQ(user.write(0, 4), Outcome::kDone);
  fs::remove(folder.objects().at(0));
  User::wait_until([&] { return user.contains(0, 4) == 0; });  // a scan does not see it any more
}

TEST(FileStore, AnObjectThatIsGoneBeforeAScanSeesItIsAMiss) {
  const Folder folder;
  User user(store_at(folder.path()), kSlotBytes, scanning_once());
  user.wait_for_scan();
  ASSERT_EQ(user.write(0, 4), Outcome::kDone);
  fs::remove(folder.objects().at(0));
  EXPECT_EQ(user.read(0, 4), Outcome::kMissing);
  EXPECT_EQ(user.faults(Fault::kGone), 1U);
  EXPECT_EQ(user.contains(0, 4), 0U);
}

TEST(FileStore, WhatOthersLeftThereIsLeftAlone) {
  const Folder folder;
  User user(store_at(folder.path()), kSlotBytes, options());
  ASSERT_EQ(user.write(0, 4), Outcome::kDone);
  const fs::path foreign = folder.objects().at(0).parent_path() / "notes.txt";
  std::ofstream(foreign) << "keep";
  const fs::path young = foreign.parent_path() / ".tmp-young";
  const fs::path old = foreign.parent_path() / ".tmp-old";
  std::ofstream(young) << "being written";
  std::ofstream(old) << "its writer was killed";
  fs::last_write_time(old, fs::file_time_type::clock::now() - std::chrono::hours(2));
  User::wait_until([&] { return !fs::exists(old); });
  EXPECT_TRUE(fs::exists(foreign) && fs::exists(young));
  EXPECT_EQ(user.read(0, 4), Outcome::kDone);
}

// Hangs as a dead file server does: a fifo without a writer, in the place of an object.
class Hang {
 public:
  explicit Hang(fs::path object) : object_(std::move(object)) {
    fs::rename(object_, kept_);
    EXPECT_EQ(::mkfifo(object_.c_str(), 0600), 0);
  }
  void end() {
    const Fd writer(::open(object_.c_str(), O_RDWR | O_NONBLOCK));
    fs::rename(kept_, object_);
  }

 private:
  const fs::path object_;
  const fs::path kept_ = object_.string() + ".kept";
};

TEST(FileStore, AHangEndsByTheDeadlineAndTheStoreComesBack) {
  const Folder folder;
  TierOptions quick = scanning_once();
  quick.engine.dispatch.breaker.stall_after = 500 * kMillisecond;
  User user(store_at(folder.path()), kSlotBytes, quick);
  user.wait_for_scan();
  ASSERT_EQ(user.write(0, 8), Outcome::kDone);
  Hang hang(folder.objects().at(0));
  const RequestId first = user.begin_read(0, 8, 50 * kMillisecond);
  EXPECT_EQ(user.end_read(first, 0), Outcome::kDeadline);
  std::vector<RequestId> more;
  for (int i = 0; i < 6; ++i) more.push_back(user.begin_read(0, 8));  // more than there are threads
  for (const RequestId id : more) EXPECT_EQ(user.end_read(id, 0), Outcome::kUnavailable);
  EXPECT_FALSE(user.tier().stats().reads_off.empty());
  EXPECT_EQ(user.contains(0, 8), 0U);
  EXPECT_EQ(user.read(0, 8), Outcome::kUnavailable);
  hang.end();
  User::wait_until([&] { return user.tier().stats().reads_off.empty(); });
  EXPECT_EQ(user.contains(0, 8), 8U);
  EXPECT_EQ(user.read(0, 8), Outcome::kDone);
}

// Who never waits as long as it takes to see a hang notices by how often that happens.
TEST(FileStore, AHangIsSeenWhenEverybodyIsImpatient) {
  const Folder folder;
  TierOptions patient = scanning_once();
  patient.engine.dispatch.breaker.stall_after = 400 * kMillisecond;
  User user(store_at(folder.path()), kSlotBytes, patient);
  user.wait_for_scan();
  ASSERT_EQ(user.write(0, 8), Outcome::kDone);
  Hang hang(folder.objects().at(0));
  Outcome last = Outcome::kDone;
  for (int i = 0; i < 60 && last != Outcome::kUnavailable; ++i) {
    const RequestId id = user.begin_read(0, 8, 200 * kMillisecond);
    last = user.end_read(id, 0);
  }
  EXPECT_EQ(last, Outcome::kUnavailable);
  EXPECT_NE(user.tier().stats().reads_off.find("in a row"), std::string::npos);
  hang.end();
  User::wait_until([&] { return user.tier().stats().reads_off.empty(); });
  EXPECT_EQ(user.read(0, 8), Outcome::kDone);
}

TEST(FileStore, WhoseFileSystemHangsCanBeEndedAndLeavesTheCallersMemoryAlone) {
  const Folder folder;
  auto user = std::make_unique<User>(store_at(folder.path()), kSlotBytes, scanning_once());
  user->wait_for_scan();
  ASSERT_EQ(user->write(0, 8), Outcome::kDone);
  Hang hang(folder.objects().at(0));
  user->begin_read(0, 8);
  User::wait_until([&] { return user->tier().stats().gets > 0; });
  user.reset();  // the buffers are freed
  hang.end();
}

TEST(FileStore, WithoutItsDirectoryItIsLeftAloneAndComesBack) {
  const Folder folder;
  const fs::path root = folder.path() / "mount";
  User user(store_at(root), kSlotBytes, options());
  std::vector<RequestId> writes;
  for (std::uint64_t i = 0; i < 4; ++i) writes.push_back(user.begin_write(i * 1000, 4));
  for (const RequestId id : writes) EXPECT_NE(user.sink().wait(id), Outcome::kDone);
  User::wait_until([&] { return !user.tier().stats().writes_off.empty(); });
  EXPECT_NE(user.tier().stats().last_error.find(root.string()), std::string::npos);
  EXPECT_EQ(user.write(0, 4), Outcome::kUnavailable);
  EXPECT_FALSE(fs::exists(root));
  fs::create_directory(root);
  User::wait_until([&] { return user.tier().stats().writes_off.empty(); });
  EXPECT_EQ(user.write(0, 4), Outcome::kDone);
  EXPECT_EQ(user.read(0, 4), Outcome::kDone);
}

TEST(FileStore, RequestsThatAreTooManyAreRefusedAndCanceledOnesEnd) {
  const Folder folder;
  TierOptions few = scanning_once();
  few.requests_max = 2;
  few.engine.dispatch.breaker.stall_after = 3600 * kSecond;
  User user(store_at(folder.path()), kSlotBytes, few);
  user.wait_for_scan();
  ASSERT_EQ(user.write(0, 8), Outcome::kDone);
  Hang hang(folder.objects().at(0));
  const RequestId one = user.begin_read(0, 8);
  const RequestId two = user.begin_read(0, 8);
  std::vector<std::byte> buffer(kSlotBytes);
  EXPECT_FALSE(user.tier().read({99, testing::kSpace, kSlotBytes, {testing::key_of(0)}, {buffer}, kSecond}));
  EXPECT_EQ(user.tier().stats().reads[static_cast<std::size_t>(Outcome::kBusy)], 1U);
  for (const RequestId id : {one, two, RequestId{12345}}) user.tier().cancel(id);
  for (const RequestId id : {one, two}) EXPECT_EQ(user.end_read(id, 0), Outcome::kCanceled);
  hang.end();
  EXPECT_EQ(user.read(0, 8), Outcome::kDone);
}

}  // namespace
}  // namespace flexkv::remote
