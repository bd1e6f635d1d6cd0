// The whole node over two drives of which one hangs, fails or loses its files: real node, agent, client, threads and
// files; what a drive does is scripted where its I/Os are given to the kernel.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <cstdarg>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "flexkv/agent/rank_agent.h"
#include "flexkv/base/prng.h"
#include "flexkv/client/client.h"
#include "flexkv/device/host_device.h"
#include "flexkv/disk/check.h"
#include "flexkv/server/node_server.h"
#include "flexkv/testing/faulty_drive.h"

namespace {

// Calls of one kind hang, for the files of blocks in one directory.
class Calls {
 public:
  enum class Kind : std::uint8_t { kNone, kAllocate, kTruncate, kOpen, kLook };  // the last one: to open to read

  void hang(Kind kind, const std::string& directory = "") {
    std::lock_guard lock(mutex_);
    kind_ = kind;
    directory_ = directory;
    changed_.notify_all();
  }
  void pass(Kind kind, const std::string& file) {
    std::unique_lock lock(mutex_);
    const auto hangs = [&] { return kind == kind_ && file.starts_with(directory_) && file.ends_with(".blocks"); };
    if (!hangs()) return;
    ++hanging_;
    changed_.wait(lock, [&] { return !hangs(); });
    --hanging_;
  }
  int hanging() const {
    std::lock_guard lock(mutex_);
    return hanging_;
  }
  static std::string path_of(int fd) {
    char path[4096];
    const ssize_t length = ::readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), path, sizeof path);
    return {path, static_cast<std::size_t>(std::max<ssize_t>(length, 0))};
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Kind kind_ = Kind::kNone;
  std::string directory_;
  int hanging_ = 0;
} calls;

}  // namespace

// Of this program: before the C library's.
int fallocate(int fd, int mode, off_t offset, off_t bytes) {
  calls.pass(Calls::Kind::kAllocate, Calls::path_of(fd));
  return static_cast<int>(::syscall(SYS_fallocate, fd, mode, offset, bytes));
}

int ftruncate(int fd, off_t bytes) noexcept {
  calls.pass(Calls::Kind::kTruncate, Calls::path_of(fd));
  return static_cast<int>(::syscall(SYS_ftruncate, fd, bytes));
}

int openat(int directory, const char* name, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  const int mode = (flags & O_CREAT) != 0 ? va_arg(rest, int) : 0;
  va_end(rest);
  const bool reads = (flags & O_ACCMODE) == O_RDONLY;
  calls.pass(reads ? Calls::Kind::kLook : Calls::Kind::kOpen, Calls::path_of(directory) + "/" + name);
  return static_cast<int>(::syscall(SYS_openat, directory, name, flags, mode));
}

namespace flexkv {
namespace {

using proto::JobId;
using proto::JobStatus;
using proto::Reason;
using testing::DriveFaults;
using Hang = DriveFaults::Hang;

constexpr std::uint32_t kBlockBytes = 4096;
constexpr std::uint32_t kDeviceBlocks = 64;
constexpr std::uint32_t kPoolBlocks = 512;  // half of them may wait to be written, beside 64 for each drive
constexpr std::uint64_t kPrompts = 8;       // of one block each, so that each lies on one drive

template <typename Condition>
bool eventually(Condition condition) {
  for (int i = 0; i < 1000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

// An engine of one rank whose prompts are one block long.
class Engine {
 public:
  Engine(const std::string& dir, server::NodeServer& node) : memory_(std::size_t{kDeviceBlocks} * kBlockBytes) {
    layout::TensorDesc tensor;
    tensor.name = "layer";
    tensor.address = reinterpret_cast<std::uint64_t>(memory_.data());
    tensor.shape = {kDeviceBlocks, kBlockBytes};
    tensor.stride = {kBlockBytes, 1};
    agent::RankAgentOptions options;
    options.runtime_dir = dir;
    options.node_name = "node";
    options.engine_id = "engine";
    agent_ = agent::RankAgent::start(options, device::open_host_device().value(),
                                     layout::BlockLayout::derive({&tensor, 1}, kDeviceBlocks).value())
                 .value();
    proto::ClientHello hello;
    hello.engine_id = "engine";
    hello.model = "model";
    client_ = std::make_unique<client::Client>(client::open_embedded_port(node, hello).value(), hello);
    EXPECT_TRUE(client_->served(60 * kSecond));
  }

  JobId save(std::uint64_t prompt) {
    std::memset(at(prompt), static_cast<int>(content(prompt)), kBlockBytes);
    show_order();
    const std::uint32_t device_block = block_of(prompt);
    const auto sequence = client_->open_sequence();
    const auto hash = hash_of(prompt);
    const std::span<const std::byte> view = hash;
    const JobId job = client_->save(sequence, 0, {&view, 1}, 0, {&device_block, 1}, client::Client::Start::kAtOnce);
    client_->close_sequence(sequence);
    return job;
  }
  // 0: it is not kept, or cannot be loaded now.
  JobId load(std::uint64_t prompt) {
    std::memset(at(prompt), 0, kBlockBytes);
    show_order();
    const std::uint32_t device_block = block_of(prompt);
    const auto sequence = client_->open_sequence();
    const auto hash = hash_of(prompt);
    const std::span<const std::byte> view = hash;
    const bool found = client_->lookup(sequence, 0, {&view, 1}).matched_blocks > 0;
    const JobId job = found ? client_->load(sequence, 0, {&device_block, 1}, client::Client::Start::kAtOnce) : 0;
    client_->close_sequence(sequence);
    return job;
  }

  void cancel(JobId job) { client_->cancel(job); }
  bool ended(JobId job) {
    for (const auto& result : client_->take_ended_jobs()) results_[result.job] = result;
    return results_.contains(job);
  }
  proto::JobResult end(JobId job) {
    while (!ended(job)) {
      if (client_->wait_ended_jobs(60 * kSecond)) continue;
      ADD_FAILURE() << "job " << job << " hangs";
      return {};
    }
    return results_.at(job);
  }
  bool saves(std::uint64_t prompt) { return end(save(prompt)).status == JobStatus::kDone; }
  // Whether it is found and loaded; with other bytes than its own is a failure.
  bool loads(std::uint64_t prompt) {
    const JobId job = load(prompt);
    return job != 0 && is_right(prompt, job);
  }
  bool is_right(std::uint64_t prompt, JobId job) {
    if (end(job).status != JobStatus::kDone) return false;
    show_order();
    EXPECT_EQ(std::count(at(prompt), at(prompt) + kBlockBytes, content(prompt)), kBlockBytes) << "prompt " << prompt;
    return true;
  }

 private:
  // Those of the first kPrompts are no other's: they may be loading.
  static std::uint32_t block_of(std::uint64_t prompt) {
    return static_cast<std::uint32_t>(prompt < kPrompts ? prompt : kPrompts + prompt % (kDeviceBlocks - kPrompts));
  }
  static std::byte content(std::uint64_t prompt) { return static_cast<std::byte>(1 + Prng::mix(prompt) % 255); }
  static std::array<std::byte, 32> hash_of(std::uint64_t prompt) {
    std::array<std::byte, 32> hash{};
    std::memcpy(hash.data(), &prompt, sizeof prompt);
    return hash;
  }
  // Copies come after their order and before their end. The order goes through rings in shared memory, where the thread
  // sanitizer does not see it; the agent's lock it does.
  void show_order() { (void)agent_->counters(); }
  std::byte* at(std::uint64_t prompt) { return memory_.data() + std::size_t{block_of(prompt)} * kBlockBytes; }

  std::vector<std::byte> memory_;
  std::unique_ptr<agent::RankAgent> agent_;
  std::unique_ptr<client::Client> client_;
  std::map<JobId, proto::JobResult> results_;
};

class DriveFaultsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "flexkv-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    dir_ = name;
    directory_ = dir_ + "/ssd-bad";
    directories_ = {directory_, dir_ + "/ssd-good"};
  }
  void TearDown() override {
    faults_->hang(Hang::kNothing);
    calls.hang(Calls::Kind::kNone);
    stop();
    std::filesystem::remove_all(dir_);
  }

  void start() {
    server::NodeServerOptions options;
    options.node.pool_bytes = kPoolBlocks * kBlockBytes;
    options.node.load_timeout = load_timeout_;
    options.node.save_timeout = save_timeout_;
    options.node.disk_admission = false;  // all that is saved is expected on the drives
    options.huge_pages = false;
    options.runtime_dir = dir_;
    options.name = "node";
    options.disk.bytes = disk_bytes_;
    options.disk.directories = directories_;
    options.disk.open_drive = [this, faults = faults_](file::DriveOptions drive, file::DriveSink& sink) {
      if (drive.directory != directory_) return file::open_drive(drive, sink);
      drive.limits = limits_;
      return DriveFaults::open(faults, drive, sink);
    };
    auto started = server::NodeServer::start(options);
    ASSERT_TRUE(started.ok()) << started.error().message;
    node_ = std::move(started).value();
    engine_ = std::make_unique<Engine>(dir_, *node_);
    ASSERT_TRUE(eventually([&] { return !status().at("spaces").at(0).at("recovering"); }));
  }
  void stop() {
    engine_.reset();
    node_.reset();
  }
  // Prompts [0, kPrompts) are on the drives, half of them on each, and not in host memory.
  void start_with_prompts_on_drives() {
    start();
    for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt) {
      ASSERT_TRUE(engine_->saves(prompt));
      ASSERT_TRUE(eventually([&] { return queue("disk_writes") == 0; }));
    }
    const nlohmann::json drives = status().at("disk").at("drives");
    for (const auto& one : drives) ASSERT_EQ(one.at("blocks_written"), kPrompts / 2);
    stop();
    start();
  }

  nlohmann::json status() const { return nlohmann::json::parse(node_->status_json()); }
  nlohmann::json drive() const { return status().at("disk").at("drives").at(0); }
  nlohmann::json scrub() const { return status().at("disk").at("scrub"); }
  std::uint64_t queue(const char* name) const { return status().at("queues").at(name); }
  std::uint64_t failed(const char* flow, const char* reason) const {
    return status().at("transfers").at(flow).at("failed_blocks").value(reason, std::uint64_t{0});
  }
  bool told(const std::string& why) const {
    const auto health = status().at("health");
    for (const std::string line : health.at("messages")) {
      if (line.starts_with("SSD cache: " + directory_ + ": ") && line.find(why) != std::string::npos) return true;
    }
    return false;
  }
  // What the log says of the drive.
  std::vector<std::string> lines(const std::string& log) const {
    std::vector<std::string> found;
    std::istringstream stream(log);
    for (std::string line; std::getline(stream, line);) {
      const auto at = line.find("SSD cache: " + directory_);
      if (at != std::string::npos) found.push_back(line.substr(at));
    }
    return found;
  }
  // More than host memory holds, so that each slot that is free is used.
  void save_others() {
    for (std::uint64_t i = 0; i < 2 * kPoolBlocks; ++i) EXPECT_TRUE(engine_->saves(next_other_++)) << "other " << i;
  }
  std::uint32_t load_all() {
    std::uint32_t loaded = 0;
    for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt) loaded += engine_->loads(prompt);
    return loaded;
  }

  std::string dir_;
  std::string directory_;  // of the drive with the faults
  std::vector<std::string> directories_;
  std::shared_ptr<DriveFaults> faults_ = std::make_shared<DriveFaults>();
  file::DriveLimits limits_{.breaker = {.stall_after = 300 * kMillisecond, .probe_after_max = 200 * kMillisecond}};
  Nanos load_timeout_ = 2 * kSecond;
  Nanos save_timeout_ = 30 * kSecond;
  std::uint64_t disk_bytes_ = 16U << 20;
  std::uint64_t next_other_ = 1000;
  std::unique_ptr<server::NodeServer> node_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(DriveFaultsTest, ADriveThatHangsFailsItsLoadsInTimeAndNothingElse) {
  limits_.depth = 2;              // what is more waits behind those that hang
  load_timeout_ = 600 * kSecond;  // they end because the drive is given up
  start_with_prompts_on_drives();
  faults_->hang(Hang::kAll);
  std::map<std::uint64_t, JobId> loads;
  for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt) {
    loads[prompt] = engine_->load(prompt);
    // The first that the drive has hangs alone: what comes together shares its I/Os.
    if (prompt == 1) {
      ASSERT_TRUE(eventually([&] { return faults_->held() == limits_.depth; }));
    }
  }
  std::erase_if(loads, [&](const auto& load) { return load.second == 0; });
  ASSERT_EQ(loads.size(), kPrompts);

  // Those of the other drive come, and saves go on, also once the drive is given up.
  ASSERT_TRUE(eventually([&] {
    std::erase_if(loads, [&](const auto& load) {
      return engine_->ended(load.second) && engine_->is_right(load.first, load.second);
    });
    return loads.size() == kPrompts / 2;
  }));
  save_others();
  std::map<Reason, int> reasons;
  for (const auto& [prompt, job] : loads) {
    EXPECT_EQ(engine_->end(job).status, JobStatus::kFailed);
    ++reasons[engine_->end(job).reason];
  }
  EXPECT_EQ(reasons[Reason::kDiskOff], kPrompts / 2) << "what the drive has, too";
  EXPECT_EQ(faults_->held(), limits_.depth);
  EXPECT_EQ(drive().at("reads"), false);
  EXPECT_TRUE(told("an I/O hangs for "));
  EXPECT_EQ(status().at("health").at("state"), "degraded");

  for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt)
    EXPECT_EQ(engine_->load(prompt) == 0, loads.contains(prompt));
  EXPECT_EQ(status().at("lookups").at("miss_blocks").at("disk_off"), kPrompts / 2);

  // The reads that hung land in host memory now; if their places had gone to others, these would be wrong.
  save_others();
  faults_->hang(Hang::kNothing);
  for (std::uint64_t other = next_other_ - kPoolBlocks; other < next_other_; ++other) (void)engine_->loads(other);
  ASSERT_TRUE(eventually([&] { return drive().at("reads") == true; }));
  EXPECT_EQ(status().at("health").at("state"), "ok") << status().at("health");
  const nlohmann::json drives = status().at("disk").at("drives");
  for (const auto& one : drives) {
    const std::string form = one.at("form");
    EXPECT_TRUE(form.starts_with(one.at("directory").get<std::string>() + " (")) << form;
    EXPECT_TRUE(form.find("io_uring") != std::string::npos || form.find("threads") != std::string::npos) << form;
    EXPECT_TRUE(form.find(", direct") != std::string::npos || form.find("page cache") != std::string::npos) << form;
  }
  EXPECT_EQ(load_all(), kPrompts) << "nothing was lost";
}

TEST_F(DriveFaultsTest, ReadsThatNobodyWaitsForAnyMoreAreTakenFromTheDrivesQueue) {
  limits_.depth = 2;
  limits_.breaker.stall_after = 600 * kSecond;  // it is slow, and not fenced off
  load_timeout_ = 60 * kSecond;
  start_with_prompts_on_drives();
  faults_->hang(Hang::kAll);
  std::vector<JobId> loads;
  for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt) {
    loads.push_back(engine_->load(prompt));
    if (prompt == 1) {
      ASSERT_TRUE(eventually([&] { return faults_->held() == limits_.depth; }));
    }
  }
  ASSERT_TRUE(eventually([&] { return queue("disk_fetches") == kPrompts / 2; })) << "those of the drive that hangs";
  for (const JobId job : loads) engine_->cancel(job);
  ASSERT_TRUE(eventually([&] { return queue("disk_fetches") == 1; })) << "what the kernel has";
  EXPECT_EQ(faults_->held(), limits_.depth);
  EXPECT_EQ(failed("from_disk", "canceled"), kPrompts / 2 - 1);
  faults_->hang(Hang::kNothing);
  ASSERT_TRUE(eventually([&] { return queue("disk_fetches") == 0; }));
  EXPECT_EQ(load_all(), kPrompts);
}

TEST_F(DriveFaultsTest, WritesThatHangDoNotHoldUpSavesOrTheOtherDrive) {
  limits_.depth = 4;       // what is more waits behind those that hang
  disk_bytes_ = 2U << 20;  // full, so that no file has to grow
  start();
  save_others();
  ASSERT_TRUE(eventually([&] { return queue("disk_writes") == 0; }));
  faults_->hang(Hang::kWrites);
  save_others();
  ASSERT_TRUE(eventually([&] { return drive().at("reads") == false; }));
  EXPECT_TRUE(told("an I/O hangs for "));
  save_others();
  ASSERT_TRUE(eventually([&] { return queue("disk_writes") == drive().at("queued"); })) << "the other has written all";
  EXPECT_GT(faults_->held(), 0U);
  EXPECT_GT(failed("to_disk", "disk_off"), 0U);
  for (std::uint64_t other = next_other_ - 16; other < next_other_; ++other) EXPECT_TRUE(engine_->loads(other));
  faults_->hang(Hang::kNothing);
  ASSERT_TRUE(eventually([&] { return drive().at("reads") == true && queue("disk_writes") == 0; }));
  EXPECT_EQ(status().at("health").at("state"), "ok");
}

TEST_F(DriveFaultsTest, AWriteThatHangsKeepsItsPlaceInHostMemoryAndThoseBehindItEndByTheirDeadline) {
  limits_.depth = 1;
  limits_.breaker.stall_after = 600 * kSecond;  // it is slow, and not fenced off
  save_timeout_ = 2 * kSecond;
  directories_ = {directory_};  // another drive, if it is faster than the saves, would get all writes
  start();
  ASSERT_TRUE(engine_->saves(0) && engine_->saves(1));
  ASSERT_TRUE(eventually([&] { return queue("disk_writes") == 0; }));
  faults_->hang(Hang::kWrites);
  // The first alone: what comes together shares its I/Os, and more than one would be in flight.
  EXPECT_TRUE(engine_->saves(2));
  ASSERT_TRUE(eventually([&] { return faults_->held() == 1; }));
  for (std::uint64_t prompt = 3; prompt < 32; ++prompt) EXPECT_TRUE(engine_->saves(prompt));
  ASSERT_TRUE(eventually([&] { return queue("disk_writes") == 1; })) << "all but the one in flight";
  EXPECT_EQ(faults_->held(), 1U);
  EXPECT_GT(failed("to_disk", "deadline"), 0U);
  EXPECT_EQ(status().at("health").at("state"), "ok");
  save_others();
  faults_->hang(Hang::kNothing);
  ASSERT_TRUE(eventually([&] { return queue("disk_writes") == 0; }));
  stop();
  // It took what is in host memory when it went on: had that been another block, it would be bad now.
  for (const std::string& directory : directories_) {
    const auto report = disk::check(directory, 0, [](auto, auto) {});
    ASSERT_TRUE(report.ok()) << report.error().message;
    EXPECT_GT(report.value().blocks, 0U);
    EXPECT_EQ(report.value().bad_blocks, 0U);
  }
}

TEST_F(DriveFaultsTest, AFileThatHangsAsItIsMadeLongerSwitchesItsDriveOff) {
  limits_.breaker.stall_after = 100 * kMillisecond;
  start();
  calls.hang(Calls::Kind::kAllocate, directory_);
  for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt) EXPECT_TRUE(engine_->saves(prompt));
  ASSERT_TRUE(eventually([&] { return drive().at("reads") == false; }));
  EXPECT_TRUE(told("making a file longer hangs for "));
  ASSERT_TRUE(eventually([&] { return queue("disk_writes") == 0; })) << "nobody waits for it any more";
  EXPECT_EQ(drive().at("blocks_written"), 0);
  EXPECT_GT(failed("to_disk", "disk_off"), 0U);
  save_others();
  EXPECT_EQ(drive().at("reads"), false) << "not probed while it hangs";
  calls.hang(Calls::Kind::kNone);
  ASSERT_TRUE(eventually([&] { return drive().at("reads") == true; }));
  save_others();
  EXPECT_TRUE(eventually([&] { return drive().at("blocks_written") > 0; }));
}

TEST_F(DriveFaultsTest, ANodeEndsWhileItsDriveHangsAndItsMemoryOutlivesIt) {
  start_with_prompts_on_drives();
  faults_->hang(Hang::kAll);
  for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt) (void)engine_->load(prompt);
  ASSERT_TRUE(eventually([&] { return faults_->held() > 0; }));
  stop();
  EXPECT_GT(faults_->held(), 0U);
  faults_->hang(Hang::kNothing);  // the reads land in the pool, which must still be there
  ASSERT_TRUE(eventually([&] { return faults_->held() == 0; }));
}

TEST_F(DriveFaultsTest, ANodeEndsWhileAFileHangsAsItIsMadeLonger) {
  start();
  calls.hang(Calls::Kind::kAllocate, directory_);
  for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt) EXPECT_TRUE(engine_->saves(prompt));
  ASSERT_TRUE(eventually([&] { return calls.hanging() == 1; }));
  ::testing::internal::CaptureStderr();
  stop();
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(calls.hanging(), 1) << "it was left behind";
  ASSERT_FALSE(lines(log).empty());
  EXPECT_EQ(lines(log).back(), "SSD cache: " + directory_ + " hangs; what it was asked for is left behind");
  // It ends, and what it would have gone on with is gone.
  calls.hang(Calls::Kind::kNone);
  ASSERT_TRUE(eventually([&] { return calls.hanging() == 0; }));
  directories_ = {dir_ + "/ssd-good"};  // what was left behind may still write to the other one: it stays locked
  start();
  EXPECT_TRUE(drive().at("reads"));
}

TEST_F(DriveFaultsTest, ADriveThatHangsAsTheNodeStartsIsLeftOut) {
  start_with_prompts_on_drives();
  stop();
  calls.hang(Calls::Kind::kLook, directory_);
  start();
  EXPECT_EQ(calls.hanging(), 1);
  EXPECT_TRUE(told("it hangs: no answer in 10 s"));
  EXPECT_EQ(load_all(), kPrompts / 2);
  save_others();
  EXPECT_TRUE(eventually([&] { return status().at("disk").at("drives").at(1).at("blocks_written") > 0; }));
}

TEST_F(DriveFaultsTest, AFileThatHangsAsItIsOpenedKeepsNeitherTheOtherDriveNorTheEndWaiting) {
  start_with_prompts_on_drives();
  stop();
  for (const bool released : {true, false}) {
    calls.hang(Calls::Kind::kOpen, directory_);
    start();  // the model is opened without that drive
    EXPECT_EQ(calls.hanging(), 1);
    EXPECT_TRUE(told("opening a file hangs for "));
    EXPECT_EQ(load_all(), kPrompts / 2);
    save_others();
    EXPECT_TRUE(eventually([&] { return status().at("disk").at("drives").at(1).at("blocks_written") > 0; }));
    if (released) {
      calls.hang(Calls::Kind::kNone);
      EXPECT_TRUE(eventually([&] { return drive().at("reads") == true; }));
    }
    stop();
    EXPECT_EQ(calls.hanging(), released ? 0 : 1);
  }
}

TEST_F(DriveFaultsTest, AFileThatHangsAsItIsCutOffKeepsTheOtherDriveNotWaiting) {
  limits_.breaker.stall_after = 100 * kMillisecond;
  disk_bytes_ = 8U << 20;
  start();
  save_others();
  ASSERT_TRUE(eventually([&] { return queue("disk_writes") == 0; }));
  stop();
  disk_bytes_ = 2U << 20;
  calls.hang(Calls::Kind::kTruncate, directory_);
  start();
  EXPECT_EQ(calls.hanging(), 1);
  EXPECT_TRUE(told("cutting a file off hangs for "));
  save_others();
  EXPECT_TRUE(eventually([&] { return status().at("disk").at("drives").at(1).at("blocks_written") > 0; }));
}

// Bytes of blocks on the drives, of which one in each of `count` blocks changes.
void damage(const std::string& directory, std::uint64_t count) {
  for (const auto& file : std::filesystem::directory_iterator(directory)) {
    if (file.path().extension() != ".blocks") continue;
    std::fstream blocks(file.path(), std::ios::binary | std::ios::in | std::ios::out);
    for (std::uint64_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::streamoff>(i * kBlockBytes + 77);
      blocks.seekg(at);
      const char byte = static_cast<char>(blocks.get() ^ 1);
      blocks.seekp(at);
      blocks.put(byte);
    }
  }
}

TEST_F(DriveFaultsTest, AScrubWhileTheNodeServesFindsWhatIsDamagedAndNothingElse) {
  start_with_prompts_on_drives();
  EXPECT_TRUE(status().at("disk").at("scrub").is_null());
  damage(directory_, 2);  // of its kPrompts / 2 blocks, which lie at the front
  ASSERT_TRUE(node_->scrub(1ULL << 40).ok());
  save_others();  // evicts, and writes to both drives, meanwhile
  ASSERT_TRUE(eventually([&] { return status().at("disk").at("scrub").at("state") == "done"; }));
  const nlohmann::json scrub = status().at("disk").at("scrub");
  EXPECT_EQ(scrub.at("blocks"), kPrompts);
  EXPECT_EQ(scrub.at("drives").at(0).at("directory"), directory_);
  EXPECT_EQ(scrub.at("drives").at(0).at("damaged_blocks"), 2);
  EXPECT_GE(scrub.at("drives").at(0).at("checked_blocks"), kPrompts / 2);
  EXPECT_EQ(scrub.at("drives").at(1).at("damaged_blocks"), 0);
  EXPECT_EQ(load_all(), kPrompts - 2);
  ASSERT_TRUE(node_->scrub(1ULL << 40).ok());
  ASSERT_TRUE(eventually([&] { return status().at("disk").at("scrub").at("state") == "done"; }));
  EXPECT_EQ(status().at("disk").at("scrub").at("drives").at(0).at("damaged_blocks"), 0) << "none has stayed";
}

TEST_F(DriveFaultsTest, AScrubOfADriveThatHangsHoldsUpNothing) {
  load_timeout_ = 600 * kSecond;
  start_with_prompts_on_drives();
  faults_->hang(Hang::kAll);
  ASSERT_TRUE(node_->scrub(1ULL << 40).ok());
  ASSERT_TRUE(eventually([&] { return drive().at("reads") == false; })) << "its reads are watched as others are";
  EXPECT_EQ(load_all(), kPrompts / 2);
  save_others();
  ASSERT_TRUE(eventually([&] { return scrub().at("state") == "done"; })) << "it waits for no drive that is off";
  EXPECT_GT(scrub().at("drives").at(0).at("unchecked_blocks"), 0);
  ASSERT_TRUE(node_->scrub(1).ok());
  ASSERT_TRUE(node_->scrub(0).ok());
  EXPECT_EQ(scrub().at("state"), "stopped");
  ASSERT_TRUE(node_->scrub(1).ok());
  stop();  // in time, with both under way
  faults_->hang(Hang::kNothing);
  ASSERT_TRUE(eventually([&] { return faults_->held() == 0; }));
}

class DisappearingDriveTest : public DriveFaultsTest, public ::testing::WithParamInterface<int> {};

TEST_P(DisappearingDriveTest, IsSaidOnceAndTheOtherServes) {
  limits_.breaker.stall_after = 600 * kSecond;  // what is slow because the machine is busy does not hang
  start_with_prompts_on_drives();
  ::testing::internal::CaptureStderr();
  faults_->fail(GetParam());
  EXPECT_EQ(load_all(), kPrompts / 2);
  save_others();
  const bool off = eventually([&] { return drive().at("reads") == false; });
  EXPECT_EQ(load_all(), kPrompts / 2);
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_TRUE(off);
  EXPECT_EQ(lines(log), std::vector{"SSD cache: " + directory_ +
                                    " is off: 8 failures in a row, the last: " + std::strerror(GetParam())});
  EXPECT_TRUE(told("8 failures in a row, the last: "));
  faults_->fail(0);
  ASSERT_TRUE(eventually([&] { return drive().at("reads") == true; }));
  EXPECT_EQ(status().at("health").at("state"), "ok");
  const std::uint64_t before = drive().at("blocks_written");
  save_others();
  EXPECT_TRUE(eventually([&] { return drive().at("blocks_written") > before; }));
}

INSTANTIATE_TEST_SUITE_P(Errors, DisappearingDriveTest, ::testing::Values(EIO, ENODEV));

TEST_F(DriveFaultsTest, ADirectoryThatIsRemovedIsUsedToItsEndAndSaidOnce) {
  limits_.breaker.stall_after = 600 * kSecond;  // what is slow because the machine is busy does not hang
  start_with_prompts_on_drives();
  ::testing::internal::CaptureStderr();
  std::filesystem::remove_all(directory_);
  EXPECT_EQ(load_all(), kPrompts) << "the node has its files open";
  save_others();
  save_others();
  const bool idle = eventually([&] { return queue("disk_writes") == 0; });
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_TRUE(idle);
  ASSERT_EQ(lines(log).size(), 1U) << log;
  EXPECT_NE(lines(log)[0].find("its files were removed"), std::string::npos);
  for (std::uint64_t other = next_other_ - 16; other < next_other_; ++other) EXPECT_TRUE(engine_->loads(other));
  stop();
  start();
  EXPECT_EQ(load_all(), kPrompts / 2);
}

TEST_F(DriveFaultsTest, FilesThatAreCutOffAreMissesAndSaidOnce) {
  limits_.breaker.stall_after = 600 * kSecond;  // what is slow because the machine is busy does not hang
  start_with_prompts_on_drives();
  ::testing::internal::CaptureStderr();
  for (const auto& file : std::filesystem::directory_iterator(directory_)) {
    const auto suffix = file.path().extension();
    if (suffix == ".blocks" || suffix == ".records") std::filesystem::resize_file(file.path(), 0);
  }
  EXPECT_EQ(load_all(), kPrompts / 2);
  const std::string log = ::testing::internal::GetCapturedStderr();
  ASSERT_EQ(lines(log).size(), 1U) << log;
  EXPECT_NE(lines(log)[0].find("shorter than what was written"), std::string::npos);
  for (std::uint64_t prompt = 0; prompt < kPrompts; ++prompt) EXPECT_TRUE(engine_->saves(prompt));
  save_others();
  ASSERT_TRUE(eventually([&] { return queue("disk_writes") == 0; }));
  EXPECT_EQ(load_all(), kPrompts);
}

}  // namespace
}  // namespace flexkv
