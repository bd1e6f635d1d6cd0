#include "mooncake_server.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "flexkv/base/assert.h"
#include "flexkv/base/fd.h"
#include "loopback.h"

namespace flexkv::testing {
namespace {

bool answers(int port) {
  const Fd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const sockaddr_in address = loopback(port);
  return ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
}

std::string python() { return std::getenv("FLEXKV_TEST_MOONCAKE"); }

// Ends with this thread. `output`: -1, or its standard output.
pid_t spawn(const std::vector<std::string>& arguments, int output) {
  std::vector<std::string> words{python(), "-P", FLEXKV_SOURCE_DIR "/tests/cpp/mooncake_server.py"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const pid_t process = ::fork();
  if (process != 0) return process;
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  ::dup2(output >= 0 ? output : STDERR_FILENO, STDOUT_FILENO);
  ::execv(argv[0], argv.data());
  std::perror(argv[0]);
  ::_exit(127);
}

void end(pid_t& process) {
  if (process < 0) return;
  ::kill(process, SIGKILL);
  ::waitpid(process, nullptr, 0);
  process = -1;
}

}  // namespace

bool MooncakeServer::possible() { return std::getenv("FLEXKV_TEST_MOONCAKE") != nullptr; }

MooncakeServer::MooncakeServer(std::uint64_t lent_bytes)
    : lent_bytes_(lent_bytes), port_(free_port()), http_port_(free_port()) {
  start_master();
  start_holder();
}

MooncakeServer::~MooncakeServer() {
  kill_holder();
  kill_master();
}

void MooncakeServer::start_master() {
  FLEXKV_ASSERT(master_ < 0);
  master_ = spawn({"master", std::to_string(port_), std::to_string(http_port_)}, -1);
  while (!answers(port_) || !answers(http_port_)) {
    FLEXKV_ASSERT(::waitpid(master_, nullptr, WNOHANG) == 0);  // otherwise it did not start, and has said why
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

void MooncakeServer::kill_master() { end(master_); }

void MooncakeServer::start_holder() {
  FLEXKV_ASSERT(holder_ < 0);
  std::array<int, 2> ends{};
  FLEXKV_ASSERT(::pipe2(ends.data(), O_CLOEXEC) == 0);
  const Fd reading(ends[0]);
  Fd writing(ends[1]);
  holder_ = spawn({"holder", std::to_string(port_), std::to_string(lent_bytes_)}, writing.get());
  writing.reset();
  std::string line;
  for (char c = 0; !line.ends_with("lends\n") && ::read(reading.get(), &c, 1) == 1;) line += c;
  FLEXKV_ASSERT(line.ends_with("lends\n"));
}

void MooncakeServer::kill_holder() { end(holder_); }

void MooncakeServer::run(const std::string& what) const {
  const pid_t process = spawn({what, std::to_string(port_), std::to_string(http_port_)}, -1);
  int status = 0;
  FLEXKV_ASSERT(::waitpid(process, &status, 0) == process && status == 0);
}

remote::MooncakeOptions MooncakeServer::options() const {
  return {{python(), "-P", "-m", "flexkv.mooncake.store"}, "http://127.0.0.1:" + std::to_string(http_port_)};
}

}  // namespace flexkv::testing
