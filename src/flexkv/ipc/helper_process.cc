#include "flexkv/ipc/helper_process.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <cerrno>
#include <utility>
#include <vector>

#include "flexkv/base/mutex.h"
#include "flexkv/ipc/poll.h"

namespace flexkv::ipc {
namespace {

// A killed process is gone at once, unless it waits for a device or frees very much memory.
constexpr Nanos kEndTime = 2 * kSecond;
constexpr int kFirstFd = 3;
// Where descriptors lie that are to be duplicated, so that none is overwritten before its turn.
constexpr int kFdsFrom = 64;

class SpawnFiles {
 public:
  SpawnFiles() { FLEXKV_ASSERT(::posix_spawn_file_actions_init(&actions_) == 0); }
  ~SpawnFiles() { ::posix_spawn_file_actions_destroy(&actions_); }
  SpawnFiles(const SpawnFiles&) = delete;
  SpawnFiles& operator=(const SpawnFiles&) = delete;

  // Their errors say that there is no memory.
  void open_null(int as) {
    FLEXKV_ASSERT(::posix_spawn_file_actions_addopen(&actions_, as, "/dev/null", O_RDONLY, 0) == 0);
  }
  void duplicate(int fd, int as) { FLEXKV_ASSERT(::posix_spawn_file_actions_adddup2(&actions_, fd, as) == 0); }
  void close_from(int fd) { FLEXKV_ASSERT(::posix_spawn_file_actions_addclosefrom_np(&actions_, fd) == 0); }
  const posix_spawn_file_actions_t* get() const { return &actions_; }

 private:
  posix_spawn_file_actions_t actions_{};
};

class SpawnAttributes {
 public:
  SpawnAttributes() {
    FLEXKV_ASSERT(::posix_spawnattr_init(&attributes_) == 0);
    sigset_t none;
    sigemptyset(&none);
    ::posix_spawnattr_setsigmask(&attributes_, &none);
    ::posix_spawnattr_setpgroup(&attributes_, 0);
    ::posix_spawnattr_setflags(&attributes_, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETPGROUP);
  }
  ~SpawnAttributes() { ::posix_spawnattr_destroy(&attributes_); }
  SpawnAttributes(const SpawnAttributes&) = delete;
  SpawnAttributes& operator=(const SpawnAttributes&) = delete;
  const posix_spawnattr_t* get() const { return &attributes_; }

 private:
  posix_spawnattr_t attributes_{};
};

// Processes that were killed and not gone in time, by descriptors that name them. Lives as long as this process.
class Leftovers {
 public:
  void add(Fd process) {
    const MutexLock lock(mutex_);
    processes_.push_back(std::move(process));
  }
  std::size_t reap() {
    const MutexLock lock(mutex_);
    std::erase_if(processes_, [](const Fd& process) { return reaped(process); });
    return processes_.size();
  }
  // Never waits. True also if somebody else has done it.
  static bool reaped(const Fd& process) {
    // Not by its number, which is somebody else's if another part of this process has waited for it.
    siginfo_t how{};
    const int failed =
        ::waitid(static_cast<idtype_t>(P_PIDFD), static_cast<id_t>(process.get()), &how, WEXITED | WNOHANG);
    return failed != 0 ? errno == ECHILD : how.si_pid != 0;
  }

 private:
  Mutex mutex_;
  std::vector<Fd> processes_ FLEXKV_GUARDED_BY(mutex_);
};

Leftovers& leftovers() {
  static auto* const all = new Leftovers;  // never destroyed: helpers may end after main()
  return *all;
}

}  // namespace

std::size_t HelperProcess::reap() { return leftovers().reap(); }

Result<HelperProcess> HelperProcess::start(std::span<const std::string> argv, std::span<const int> fds) {
  (void)reap();
  FLEXKV_ASSERT(!argv.empty() && kFirstFd + 1 + fds.size() < kFdsFrom);
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) return errno_error("socketpair", errno);
  auto socket = Socket::adopt(Fd(pair[0]));
  const Fd other(pair[1]);
  if (!socket) return socket.error();

  SpawnFiles files;
  files.open_null(STDIN_FILENO);
  files.duplicate(STDERR_FILENO, STDOUT_FILENO);
  std::vector<Fd> high;
  int next = kFirstFd;
  const auto give = [&](int fd) {
    high.emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, kFdsFrom));
    if (!high.back().valid()) return false;
    files.duplicate(high.back().get(), next++);
    return true;
  };
  bool given = give(other.get());
  for (const int fd : fds) given = given && give(fd);
  if (!given) return errno_error("descriptors for " + argv[0], errno);
  files.close_from(next);

  std::vector<char*> arguments;
  for (const std::string& argument : argv) arguments.push_back(const_cast<char*>(argument.c_str()));
  arguments.push_back(nullptr);
  const SpawnAttributes attributes;
  pid_t pid = -1;
  const int failed = ::posix_spawnp(&pid, arguments[0], files.get(), attributes.get(), arguments.data(), environ);
  if (failed != 0) return errno_error("cannot start " + argv[0], failed);
  Fd process(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0U)));
  if (!process.valid()) {
    const Error error = errno_error("pidfd_open", errno);
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    return error;
  }
  return HelperProcess(pid, std::move(process), std::move(socket).value());
}

HelperProcess::~HelperProcess() {
  if (!process_.valid()) return;
  ::syscall(SYS_pidfd_send_signal, process_.get(), SIGKILL, nullptr, 0U);
  pollfd gone{.fd = process_.get(), .events = POLLIN, .revents = 0};
  (void)poll_until({&gone, 1}, deadline_after(kEndTime));
  if (!Leftovers::reaped(process_)) leftovers().add(std::move(process_));
  (void)reap();
}

}  // namespace flexkv::ipc
