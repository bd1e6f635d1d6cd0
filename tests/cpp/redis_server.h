// A real redis-server of this test's own, on a UNIX socket in a directory of its own and on a free port.
#pragma once

#include <sys/types.h>

#include <string>

#include "flexkv/meta/redis_channel.h"

namespace flexkv::testing {

class RedisServer {
 public:
  explicit RedisServer(const std::string& password = "");
  ~RedisServer();
  RedisServer(const RedisServer&) = delete;
  RedisServer& operator=(const RedisServer&) = delete;

  // Returns once it serves. It begins empty each time.
  void start();
  void kill();
  void freeze();
  void thaw();

  meta::RedisOptions over_socket() const;
  meta::RedisOptions over_tcp() const;

 private:
  const std::string password_;
  std::string directory_;
  int port_ = 0;
  pid_t process_ = -1;
};

}  // namespace flexkv::testing
