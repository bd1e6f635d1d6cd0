#include "s3_server.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "flexkv/base/assert.h"
#include "flexkv/base/fd.h"
#include "loopback.h"

namespace flexkv::testing {
S3Server::S3Server() : port_(free_port()) { start(); }

S3Server::~S3Server() { kill(); }

void S3Server::start() {
  FLEXKV_ASSERT(process_ < 0);
  const char* const chosen = std::getenv("FLEXKV_S3_PYTHON");
  const std::string python = chosen != nullptr ? chosen : FLEXKV_SOURCE_DIR "/.venv/bin/python";
  const std::string port = std::to_string(port_);
  std::array<int, 2> ends{};
  FLEXKV_ASSERT(::pipe2(ends.data(), O_CLOEXEC) == 0);
  Fd reading(ends[0]);
  Fd writing(ends[1]);
  process_ = ::fork();
  if (process_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::dup2(writing.get(), STDOUT_FILENO);
    ::execl(python.c_str(), python.c_str(), FLEXKV_SOURCE_DIR "/tests/cpp/s3_server.py", port.c_str(), "bucket",
            nullptr);
    std::perror((python + " (scripts/setup --tests makes it; FLEXKV_S3_PYTHON names another one with moto)").c_str());
    ::_exit(127);
  }
  writing.reset();
  std::string line;
  for (char c = 0; ::read(reading.get(), &c, 1) == 1 && c != '\n';) line += c;
  std::istringstream words(line);
  user_.endpoint = role_.endpoint = "http://127.0.0.1:" + port;
  user_.path_style = role_.path_style = true;
  words >> user_.access_key >> user_.secret_key >> role_.access_key >> role_.secret_key >> role_.session_token;
  FLEXKV_ASSERT(!role_.session_token.empty());  // otherwise it did not start, and has said why
}

void S3Server::kill() {
  if (process_ < 0) return;
  ::kill(process_, SIGKILL);
  ::waitpid(process_, nullptr, 0);
  process_ = -1;
}

void S3Server::fault(const std::string& kind, unsigned count) const {
  const Fd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const sockaddr_in address = loopback(port_);
  FLEXKV_ASSERT(::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0);
  const std::string request = "POST /faults/" + kind + '/' + std::to_string(count) +
                              " HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
  FLEXKV_ASSERT(::send(socket.get(), request.data(), request.size(), 0) == static_cast<ssize_t>(request.size()));
  std::array<char, 512> answer{};
  while (::read(socket.get(), answer.data(), answer.size()) > 0) {
  }
}

}  // namespace flexkv::testing
