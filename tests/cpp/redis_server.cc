#include "redis_server.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "flexkv/base/assert.h"
#include "loopback.h"

namespace flexkv::testing {
RedisServer::RedisServer(const std::string& password) : password_(password), port_(free_port()) {
  char pattern[] = "/tmp/flexkv-redis-XXXXXX";
  FLEXKV_ASSERT(::mkdtemp(pattern) != nullptr);
  directory_ = pattern;
  start();
}

RedisServer::~RedisServer() {
  kill();
  std::filesystem::remove_all(directory_);
}

void RedisServer::start() {
  FLEXKV_ASSERT(process_ < 0);
  const std::string socket = directory_ + "/redis.sock";
  const std::string port = std::to_string(port_);
  process_ = ::fork();
  if (process_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::execlp("redis-server", "redis-server", "--port", port.c_str(), "--bind", "127.0.0.1", "--unixsocket",
             socket.c_str(), "--dir", directory_.c_str(), "--save", "", "--appendonly", "no", "--loglevel", "warning",
             "--daemonize", "no", "--requirepass", password_.c_str(), nullptr);
    std::perror("redis-server (Debian package redis-server)");
    ::_exit(127);
  }
  meta::RedisChannel channel(over_tcp(), 1);
  while (!channel.ready()) {
    int status = 0;
    FLEXKV_ASSERT(::waitpid(process_, &status, WNOHANG) == 0);
    channel.step(monotonic_now());
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

void RedisServer::kill() {
  if (process_ < 0) return;
  ::kill(process_, SIGKILL);
  ::waitpid(process_, nullptr, 0);
  process_ = -1;
}

void RedisServer::freeze() { ::kill(process_, SIGSTOP); }
void RedisServer::thaw() { ::kill(process_, SIGCONT); }

meta::RedisOptions RedisServer::over_socket() const {
  meta::RedisOptions options = over_tcp();
  options.host = directory_ + "/redis.sock";
  return options;
}

meta::RedisOptions RedisServer::over_tcp() const {
  meta::RedisOptions options;
  options.port = port_;
  options.password = password_;
  options.retry_after_max = 500 * kMillisecond;
  return options;
}

}  // namespace flexkv::testing
