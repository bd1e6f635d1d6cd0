// Processes that write to the remote tier on real files are killed: what others then find is whole and right, and what
// was reported written is there. FLEXKV_KILLS=count chooses how many.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>

#include "flexkv/base/log.h"
#include "flexkv/remote/file_store.h"
#include "flexkv/remote/test_tier.h"

namespace flexkv::remote {
namespace {

using testing::Folder;
using testing::User;

constexpr std::uint64_t kDefaultKills = 60;
constexpr std::size_t kSlotBytes = 128 << 10;
constexpr std::uint64_t kChainBlocks = 8;

// Shared with the process that is killed.
struct Ledger {
  std::atomic<std::uint64_t> begun = 0;  // chains, from the first one on
  std::atomic<std::uint64_t> done = 0;   // whose writes were reported done
};

TierOptions options() {
  TierOptions options;
  options.engine.object_bytes = 4 * (kSlotBytes + kHeadBytes);
  return options;
}

std::unique_ptr<Store> store_at(const Folder& folder) { return std::make_unique<FileStore>(folder.path().string(), 4); }

void write_until_killed(const Folder& folder, Ledger& ledger) {
  User user(store_at(folder), kSlotBytes, options());
  while (true) {
    const std::uint64_t chain = ledger.begun++;
    if (user.write(chain * 1000, kChainBlocks) != Outcome::kDone) ::_exit(1);
    ++ledger.done;
  }
}

// Objects that are being written.
std::size_t temporary_files(const Folder& folder) {
  std::size_t count = 0;
  std::error_code gone;  // a file may be, meanwhile
  for (auto at = std::filesystem::recursive_directory_iterator(folder.path(), gone);
       at != std::filesystem::recursive_directory_iterator(); at.increment(gone)) {
    count += at->path().filename().string().starts_with(".tmp-");
  }
  return count;
}

TEST(RemoteKills, WhatIsFoundAfterThemIsWholeAndNothingReportedIsLost) {
  set_log_level(LogLevel::kError);
  const char* const wanted = std::getenv("FLEXKV_KILLS");
  const std::uint64_t kills = wanted == nullptr ? kDefaultKills : std::strtoull(wanted, nullptr, 10);
  void* const memory = ::mmap(nullptr, sizeof(Ledger), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  Prng random(1);
  std::uint64_t cut_off = 0, done = 0, found = 0;
  for (std::uint64_t kill = 0; kill < kills; ++kill) {
    const Folder folder;
    Ledger& ledger = *new (memory) Ledger;
    // No thread of ours runs here, so the child may do whatever it likes.
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      write_until_killed(folder, ledger);
    }
    const std::uint64_t chains = random.below(6);
    while (ledger.begun <= chains) std::this_thread::yield();
    if (random.chance(50)) {
      std::this_thread::sleep_for(std::chrono::microseconds(random.below(5000)));
    } else {
      while (temporary_files(folder) == 0) std::this_thread::yield();
    }
    ::kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << status;
    cut_off += temporary_files(folder);
    User reader(store_at(folder), kSlotBytes, options());
    reader.wait_for_scan();
    for (std::uint64_t chain = 0; chain < ledger.begun; ++chain) {
      const std::size_t blocks = reader.contains(chain * 1000, kChainBlocks);
      EXPECT_TRUE(blocks == kChainBlocks || chain >= ledger.done) << "chain " << chain << ": " << blocks;
      found += blocks;
      EXPECT_TRUE(blocks == 0 || reader.read(chain * 1000, blocks) == Outcome::kDone) << "chain " << chain;
      // Who comes later writes what is missing.
      EXPECT_EQ(reader.write(chain * 1000, kChainBlocks), Outcome::kDone);
      EXPECT_EQ(reader.read(chain * 1000, kChainBlocks), Outcome::kDone);
    }
    done += ledger.done;
    for (const std::uint64_t faults : reader.tier().stats().faults) EXPECT_EQ(faults, 0U);
    ASSERT_FALSE(HasFailure()) << "kill " << kill;
  }
  ::munmap(memory, sizeof(Ledger));
  const auto number = [](std::uint64_t value) { return static_cast<unsigned long long>(value); };
  std::printf("%llu kills, %llu writes done, %llu blocks found, %llu objects cut off\n", number(kills), number(done),
              number(found), number(cut_off));
  EXPECT_GT(done, kills / 2);
  EXPECT_GT(cut_off, 0U) << "no kill came while an object was written";
}

}  // namespace
}  // namespace flexkv::remote
