// Start of a node over full drives: a store of many blocks is made (records as the tier writes them, payload sparse),
// and opened through the tier and the node until a lookup finds every block. Nothing of it is in the page cache then.
// Blocks are those of conversations that shared drives turn by turn; `shuffled`: as after long use, when slots are
// taken in no order.
//
// Counters, seconds: raw_read: the records read alone, one thread per drive, past the page cache. found: until the
// first block came out: reading with decoding and the table beside it, then the links. emitted: from then on, parents
// before children; inserted: of that, in the node's index. cpu: of all threads, until open. lookup: of all
// conversations. peak_GB: most memory in use while opening, without what the benchmark itself had; kept_GB: of it, when
// open.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <numeric>
#include <optional>
#include <thread>

#include "bench/suites.h"
#include "flexkv/base/assert.h"
#include "flexkv/base/fd.h"
#include "flexkv/disk/recovery.h"
#include "flexkv/file/open_drive.h"
#include "flexkv/server/disk_bridge.h"

namespace flexkv::bench {
namespace {

constexpr std::uint64_t kSlotBytes = 4096;
constexpr std::uint64_t kPoolBlocks = 1024;  // a prompt may take 3/4 of them
constexpr std::uint64_t kEpoch = 1;
constexpr std::size_t kPieceBytes = 1 << 20;

double seconds(Nanos time) { return static_cast<double>(time) / kSecond; }

double cpu_seconds(clockid_t clock) {
  timespec time{};
  ::clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// VmRSS or VmHWM of this process, in GB.
double memory_gb(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(field + ":")) return 1024e-9 * std::strtod(line.c_str() + field.size() + 1, nullptr);
  }
  return 0;
}

void forget_peak_memory() { std::ofstream("/proc/self/clear_refs") << "5"; }

// A conversation's blocks, as many of them as the store holds.
struct Conversation {
  std::uint64_t number = 0;
  std::uint32_t blocks = 0;
};

// Calls `write(key, parent)` for so many blocks in the order in which conversations are written; returns these.
template <typename Write>
std::vector<Conversation> write_conversations(std::uint64_t block_count, const Write& write) {
  std::vector<Conversation> all;
  constexpr Shape kShape = kChat32;
  std::uint64_t written = 0;
  for (std::uint64_t group = 0; written < block_count; ++group) {
    std::vector<Keys> keys;
    for (std::uint32_t i = 0; i < kShape.group; ++i) {
      all.push_back({group * kShape.group + i, 0});
      keys.push_back(conversation_keys(kShape, all.back().number));
    }
    const auto part = [&](std::uint32_t which, std::uint32_t begin, std::uint32_t end) {
      for (std::uint32_t at = begin; at < end && written < block_count; ++at, ++written) {
        write(keys[which][at], at == 0 ? disk::kNoParent : keys[which][at - 1]);
        all[all.size() - kShape.group + which].blocks = at + 1;
      }
    };
    part(0, 0, kShape.shared_blocks);
    for (std::uint32_t at = kShape.shared_blocks; at < kConversationBlocks; at += kShape.turn_blocks) {
      for (std::uint32_t i = 0; i < kShape.group; ++i) part(i, at, at + kShape.turn_blocks);
    }
  }
  std::erase_if(all, [](const Conversation& conversation) { return conversation.blocks == 0; });
  return all;
}

// Takes nothing; tells what a space of the benchmark's engine is called on drives.
class NameTaker final : public node::DiskPort {
 public:
  unsigned drive_count() const override { return 1; }
  void open_space(node::SpaceNumber, const node::SpaceName& opened, std::uint64_t) override { name = opened; }
  void close_space(node::SpaceNumber) override {}
  void reset_space(node::SpaceNumber) override {}
  void reset_closed_spaces(const std::optional<node::ModelName>&) override {}
  node::DiskAdmission write(const node::DiskTransfer&) override { return node::DiskAdmission::kUnavailable; }
  node::DiskAdmission read(const node::DiskTransfer&) override { return node::DiskAdmission::kUnavailable; }
  node::DiskAdmission verify(const node::DiskTransfer&) override { return node::DiskAdmission::kUnavailable; }
  void cancel(node::DiskOp) override {}
  bool can_read(unsigned) const override { return false; }
  double write_pressure() const override { return 0; }

  node::SpaceName name{};
};

class Silence final : public node::Outbox {
 public:
  bool send(node::AgentHandle, const proto::ToAgent&) override { return false; }
  void send(node::EngineHandle, const proto::JobResult&) override {}
};

node::EngineHandle attach(node::Node& node) {
  FLEXKV_ASSERT(node.attach_agent({"engine", 0, 1, {}, kSlotBytes, 1, "none"}).ok());
  return node.attach_client({"engine", 1, "bench", {}}).value();
}

node::NodeOptions node_options(std::uint64_t blocks) {
  node::NodeOptions options;
  options.pool_bytes = kPoolBlocks * kSlotBytes;
  options.disk_bytes = blocks * kSlotBytes;
  return options;
}

// A `.records` file under construction.
class RecordsFile {
 public:
  static Result<std::unique_ptr<RecordsFile>> make(const std::string& directory, const disk::SpaceCodec& codec,
                                                   std::uint64_t slots) {
    std::filesystem::create_directories(directory);
    Fd fd(::open((directory + "/" + codec.records_name()).c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    const Fd blocks(
        ::open((directory + "/" + codec.blocks_name()).c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    const std::uint64_t bytes = disk::records_file_bytes(slots);
    if (!fd.valid() || !blocks.valid() || ::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0 ||
        ::ftruncate(blocks.get(), static_cast<off_t>(slots * kSlotBytes)) != 0) {
      return errno_error("make a store in " + directory, errno);
    }
    void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    if (memory == MAP_FAILED) return errno_error("map the records in " + directory, errno);
    std::unique_ptr<RecordsFile> file(new RecordsFile(std::move(fd), static_cast<std::byte*>(memory), bytes));
    const auto page = disk::encode_header({codec.space(), codec.slot_bytes(), kEpoch});
    std::memcpy(file->memory_, page.data(), page.size());
    return Result<std::unique_ptr<RecordsFile>>(std::move(file));
  }
  ~RecordsFile() {
    (void)::munmap(memory_, bytes_);
    (void)::fsync(fd_.get());
    (void)::posix_fadvise(fd_.get(), 0, 0, POSIX_FADV_DONTNEED);
  }
  RecordsFile(const RecordsFile&) = delete;
  RecordsFile& operator=(const RecordsFile&) = delete;

  void put(std::uint32_t index, const disk::RecordBytes& record) {
    std::memcpy(memory_ + disk::kHeaderBytes + index * disk::kRecordBytes, record.data(), record.size());
  }

 private:
  RecordsFile(Fd fd, std::byte* memory, std::uint64_t bytes) : fd_(std::move(fd)), memory_(memory), bytes_(bytes) {}

  const Fd fd_;
  std::byte* const memory_;
  const std::uint64_t bytes_;
};

struct Store {
  std::string root;
  std::uint64_t blocks = 0;
  unsigned drives = 0;
  bool shuffled = false;
  std::vector<std::string> directories;
  std::vector<Conversation> conversations;
};

Status fill(Store& store) {
  Silence silence;
  NameTaker taker;
  node::Node node(node_options(store.blocks), silence, &taker);
  (void)attach(node);
  const disk::SpaceCodec codec(taker.name, kSlotBytes);
  std::vector<std::unique_ptr<RecordsFile>> files;
  for (unsigned drive = 0; drive < store.drives; ++drive) {
    store.directories.push_back(store.root + "/" + std::to_string(drive));
    const std::uint64_t slots = (store.blocks + store.drives - 1 - drive) / store.drives;
    auto made = RecordsFile::make(store.directories.back(), codec, slots);
    if (!made) return made.error();
    files.push_back(std::move(made).value());
  }
  // All slots once, each far from the one before.
  std::uint64_t step = store.shuffled ? static_cast<std::uint64_t>(0.618 * static_cast<double>(store.blocks)) | 1 : 1;
  while (std::gcd(step, store.blocks) != 1) step += 2;
  std::uint64_t slot = 0;
  disk::Record record;
  record.epoch = kEpoch;
  store.conversations = write_conversations(store.blocks, [&](const key::BlockKey& key, const key::BlockKey& parent) {
    record.key = key;
    record.parent = parent;
    ++record.sequence;
    record.checksum = Prng::mix(record.sequence);
    const auto index = static_cast<std::uint32_t>(slot / store.drives);
    files[slot % store.drives]->put(index, codec.encode(record, index));
    slot = (slot + step) % store.blocks;
  });
  return {};
}

// Reads the files in pieces, a few at once, past the page cache.
double raw_read_seconds(const Store& store) {
  const Nanos begun = monotonic_now();
  std::vector<std::thread> threads;
  for (const std::string& directory : store.directories) {
    for (const auto& entry : std::filesystem::directory_iterator(directory)) {
      if (entry.path().extension() != ".records") continue;
      threads.emplace_back([path = entry.path().string()] {
        const Fd fd(::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
        const std::unique_ptr<void, decltype(&std::free)> buffer(std::aligned_alloc(4096, kPieceBytes), &std::free);
        while (::read(fd.get(), buffer.get(), kPieceBytes) > 0) {
        }
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
  return seconds(monotonic_now() - begun);
}

// The node over its drives, as a server has it.
class World {
 public:
  explicit World(const Store& store) : pool_(std::aligned_alloc(4096, kPoolBlocks * kSlotBytes), &std::free) {
    server::DiskOptions options;
    options.directories = store.directories;
    options.bytes = 2 * store.blocks * (kSlotBytes + disk::kRecordBytes) + (64ULL << 20) * store.drives;
    const std::span pool(static_cast<std::byte*>(pool_.get()), kPoolBlocks * kSlotBytes);
    bridge_ = server::DiskBridge::open(options, pool, [this](const auto& call) { apply(call); }).value();
    node_.emplace(node_options(store.blocks), silence_, bridge_.get());
  }
  ~World() { (void)bridge_->close(kSecond); }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  node::Node& node() { return *node_; }
  const server::DiskBridge& bridge() const { return *bridge_; }
  node::EngineHandle open() {
    std::unique_lock lock(mutex_);
    const auto engine = attach(*node_);
    opened_.wait(lock, [&] { return !node_->spaces()[0].recovering; });
    return engine;
  }

  Nanos first_block = 0;
  Nanos inserting = 0;

 private:
  void apply(const std::function<void(node::Node&)>& call) {
    std::lock_guard lock(mutex_);
    const Nanos begun = monotonic_now();
    if (first_block == 0) first_block = begun;
    call(*node_);
    inserting += monotonic_now() - begun;
    opened_.notify_all();
  }

  const std::unique_ptr<void, decltype(&std::free)> pool_;
  Silence silence_;
  std::mutex mutex_;
  std::condition_variable opened_;
  std::unique_ptr<server::DiskBridge> bridge_;
  std::optional<node::Node> node_;
};

void bm_recovery(benchmark::State& state, Store store) {
  // Under a name of its own, so that nothing else is removed at the end.
  store.root += "/flexkv-bench-recovery-" + std::to_string(::getpid());
  const std::unique_ptr<const std::string, void (*)(const std::string*)> remove(
      &store.root, [](const std::string* root) { std::filesystem::remove_all(*root); });
  if (const Status filled = fill(store); !filled) return state.SkipWithError(filled.error().message.c_str());
  for (auto _ : state) {
    state.counters["raw_read"] = raw_read_seconds(store);
    World world(store);
    const double before_gb = memory_gb("VmRSS");
    forget_peak_memory();
    const double cpu = cpu_seconds(CLOCK_PROCESS_CPUTIME_ID);
    const Nanos begun = monotonic_now();
    const auto engine = world.open();
    const Nanos opened = monotonic_now();
    state.SetIterationTime(seconds(opened - begun));
    state.counters["cpu"] = cpu_seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    state.counters["peak_GB"] = memory_gb("VmHWM") - before_gb;
    state.counters["kept_GB"] = memory_gb("VmRSS") - before_gb;
    state.counters["found"] = seconds(world.first_block - begun);
    state.counters["emitted"] = seconds(opened - world.first_block);
    state.counters["inserted"] = seconds(world.inserting);

    std::uint64_t missing = 0;
    const Nanos asked = monotonic_now();
    for (const Conversation& conversation : store.conversations) {
      const Keys keys = conversation_keys(kChat32, conversation.number);
      const auto found = world.node().lookup(engine, 1, 0, std::span(keys).first(conversation.blocks), monotonic_now());
      missing += conversation.blocks - found.matched_blocks;
      world.node().close_sequence(engine, 1);
    }
    state.counters["lookup"] = seconds(monotonic_now() - asked);
    const std::uint64_t recovered = world.node().stats().disk_blocks_recovered;
    if (missing > 0 || recovered != store.blocks) {
      state.SkipWithError((std::to_string(recovered) + " of " + std::to_string(store.blocks) + " blocks recovered; " +
                           std::to_string(missing) + " blocks of prompts not found")
                              .c_str());
    }
  }
}

}  // namespace

Status register_recovery(const std::string& directory, const Options& options) {
  const auto blocks = options.counts("blocks", {10'000'000});
  const auto drives = options.counts("drives", {2});
  if (!blocks) return blocks.error();
  if (!drives) return drives.error();
  for (const auto block_count : blocks.value()) {
    for (const auto drive_count : drives.value()) {
      for (const bool shuffled : {false, true}) {
        const std::string name = std::string("recovery/") + (shuffled ? "shuffled" : "in_order") +
                                 "/blocks:" + std::to_string(block_count) + "/drives:" + std::to_string(drive_count);
        const Store store{directory, block_count, drive_count, shuffled, {}, {}};
        benchmark::RegisterBenchmark(name.c_str(), [=](auto& state) { bm_recovery(state, store); })
            ->UseManualTime()
            ->Iterations(1)
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
  return {};
}

}  // namespace flexkv::bench
