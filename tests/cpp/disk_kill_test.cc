// Processes that write to the SSD tier on real files are killed, hundreds of times: see disk_kill.h for what each of
// them checks. FLEXKV_KILLS=count chooses how many.
#include "disk_kill.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "flexkv/base/log.h"
#include "flexkv/base/prng.h"
#include "flexkv/disk/record.h"

namespace flexkv::testing {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kDefaultKills = 300;
constexpr std::uint64_t kKillsPerHome = 25;
constexpr std::uint64_t kOverheadBytes = 64 << 10;  // the tier's, for all but blocks and records
// By then something hangs.
constexpr auto kPatience = std::chrono::minutes(5);

struct Unmap {
  void operator()(KillLedger* ledger) const { ::munmap(ledger, sizeof(KillLedger)); }
};

// Two directories, the processes that use them one after another, and what they have in common.
class Home {
 public:
  explicit Home(std::uint64_t seed) : prng_(Prng::mix(seed)) {
    std::string name = (fs::temp_directory_path() / "flexkv-kills-XXXXXX").string();
    EXPECT_NE(::mkdtemp(name.data()), nullptr);
    path_ = name;
    directories_ = {name + "/a", name + "/b"};
    void* const memory = ::mmap(nullptr, sizeof(KillLedger), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    EXPECT_NE(memory, MAP_FAILED);
    ledger_.reset(new (memory) KillLedger);
    ledger_->strict = seed % 2 == 1;
    ledger_->slot_bytes = std::uint64_t{16 << 10} << 2 * (seed / 2 % 3);  // 16, 64, 256 KiB
    ledger_->share_bytes =
        kKillSlotsPerDrive * ledger_->slot_bytes + disk::records_file_bytes(kKillSlotsPerDrive) + kOverheadBytes;
  }
  ~Home() { fs::remove_all(path_); }

  // False: it ended by itself before.
  bool run_and_kill() {
    const auto target = static_cast<KillPhase>(prng_.below(kKillPhases));
    const bool closes = target == KillPhase::kClosing;
    const std::uint32_t steps = closes ? 0 : static_cast<std::uint32_t>(prng_.below(200));
    const auto arrivals = static_cast<std::uint32_t>(1 + prng_.below(2));
    const std::chrono::microseconds delay(prng_.below(target == KillPhase::kWriting ? 3000 : 6000));
    start(closes ? static_cast<std::uint32_t>(prng_.below(100)) : 2000, target == KillPhase::kResetting ? 50 : 5,
          target == KillPhase::kOpening || target == KillPhase::kReading ? 30 : 3);
    const auto there = [&] {
      if (target == KillPhase::kStarting) return true;
      if (target == KillPhase::kWriting) return ledger_->steps_done >= steps;
      return ledger_->arrivals[static_cast<std::size_t>(target)] >= (closes ? 1 : arrivals);
    };
    if (!wait(there)) return false;
    check_bytes();
    std::this_thread::sleep_for(delay);
    ::kill(child_, SIGKILL);
    int status = 0;
    EXPECT_EQ(::waitpid(child_, &status, 0), child_);
    judge(status);
    return WIFSIGNALED(status);
  }

  // Reads all that is there, and ends.
  void run_to_the_end() {
    start(0, 0, 0);
    EXPECT_FALSE(wait([] { return false; }));
  }

  const KillLedger& ledger() const { return *ledger_; }

 private:
  void start(std::uint32_t steps, std::uint32_t resets_in_1000, std::uint32_t reopens_in_1000) {
    ledger_->seed = prng_.next();
    ledger_->steps = steps;
    ledger_->resets_in_1000 = resets_in_1000;
    ledger_->reopens_in_1000 = reopens_in_1000;
    ledger_->phase = KillPhase::kStarting;
    for (auto& count : ledger_->arrivals) count = 0;
    ledger_->steps_done = 0;
    // There is no other thread here, so the child may do whatever it likes.
    child_ = ::fork();
    ASSERT_GE(child_, 0);
    if (child_ > 0) return;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    // Never destroyed: the tier's threads may be in it still.
    (new KillUser(directories_, *ledger_))->run();
    ::_exit(0);
  }

  // Until the process is there; false: it has ended.
  template <typename Condition>
  bool wait(Condition there) {
    const auto until = std::chrono::steady_clock::now() + kPatience;
    int status = 0;
    while (::waitpid(child_, &status, WNOHANG) == 0) {
      if (there()) return true;
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      if (std::chrono::steady_clock::now() < until) continue;
      ADD_FAILURE() << "a process hangs in phase " << static_cast<int>(ledger_->phase.load());
      ::kill(child_, SIGKILL);
      ::waitpid(child_, &status, 0);
      break;
    }
    judge(status);
    return false;
  }

  void judge(int status) {
    EXPECT_TRUE(WIFEXITED(status) ? WEXITSTATUS(status) == 0 : WTERMSIG(status) == SIGKILL) << "status " << status;
    EXPECT_FALSE(ledger_->failed) << "slots of " << ledger_->slot_bytes << " bytes, strict " << ledger_->strict
                                  << ", phase " << static_cast<int>(ledger_->phase.load()) << ": "
                                  << ledger_->failure.data();
    check_bytes();
  }

  // Never more than the tier may take, by the sizes of files and by what the file system spends on them.
  void check_bytes() const {
    for (const std::string& directory : directories_) {
      std::uint64_t bytes = 0, spent = 0;
      if (!fs::exists(directory)) continue;
      for (const auto& entry : fs::directory_iterator(directory)) {
        struct stat info {};
        if (::stat(entry.path().c_str(), &info) != 0) continue;  // gone meanwhile
        bytes += static_cast<std::uint64_t>(info.st_size);
        spent += static_cast<std::uint64_t>(info.st_blocks) * 512;
      }
      EXPECT_LE(std::max(bytes, spent), ledger_->share_bytes) << directory;
    }
  }

  Prng prng_;
  fs::path path_;
  std::vector<std::string> directories_;
  std::unique_ptr<KillLedger, Unmap> ledger_;
  pid_t child_ = 0;
};

constexpr std::pair<const char*, std::atomic<std::uint64_t> KillTotals::*> kShown[] = {
    {"openings", &KillTotals::openings},
    {"writes", &KillTotals::writes},
    {"reads", &KillTotals::reads},
    {"reads refused", &KillTotals::refused_reads},
    {"resets durable", &KillTotals::resets},
    {"blocks found", &KillTotals::recovered},
    {"of them had to be", &KillTotals::expected},
    {"slots with a write that a kill cut off", &KillTotals::cut_off},
    {"that was there all the same", &KillTotals::completed},
};

TEST(DiskKills, WhatIsServedAfterThemWasWrittenAndNothingIsLost) {
  set_log_level(LogLevel::kError);
  const char* const wanted = std::getenv("FLEXKV_KILLS");
  const std::uint64_t kills_wanted = wanted == nullptr ? kDefaultKills : std::strtoull(wanted, nullptr, 10);
  std::uint64_t kills = 0, ends = 0, expected = 0, cut_off = 0;
  std::array<std::uint64_t, kKillPhases> kills_in{};
  std::array<std::uint64_t, std::size(kShown)> sums{};
  for (std::uint64_t seed = 0; kills < kills_wanted; ++seed) {
    Home home(seed);
    for (std::uint64_t i = 0; i < kKillsPerHome && kills < kills_wanted;) {
      if (home.run_and_kill()) {
        ++i;
        ++kills;
        ++kills_in[static_cast<std::size_t>(home.ledger().phase.load())];
      } else {
        ++ends;
      }
      ASSERT_FALSE(HasFailure()) << "directories " << seed << ", kill " << i;
    }
    home.run_to_the_end();
    ASSERT_FALSE(HasFailure()) << "directories " << seed;
    const KillTotals& totals = home.ledger().totals;
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += totals.*kShown[i].second;
    expected += totals.expected;
    cut_off += totals.cut_off;
  }
  const auto show = [](const char* what, std::uint64_t value) {
    std::printf("%s %llu, ", what, static_cast<unsigned long long>(value));
  };
  show("kills", kills);
  show("ends before one", ends);
  std::printf("\nkills while starting, opening, reading, writing, resetting, closing:");
  for (const std::uint64_t count : kills_in) std::printf(" %llu", static_cast<unsigned long long>(count));
  std::printf("\n");
  for (std::size_t i = 0; i < sums.size(); ++i) show(kShown[i].first, sums[i]);
  std::printf("\n");
  // A tier in which nothing is ever found would pass all checks.
  EXPECT_GE(expected, 5 * kills_wanted);
  EXPECT_GE(cut_off, kills_wanted / 2);
  if (kills_wanted < kDefaultKills) return;
  for (const std::uint64_t count : kills_in) EXPECT_GT(count, 0U);
}

}  // namespace
}  // namespace flexkv::testing
