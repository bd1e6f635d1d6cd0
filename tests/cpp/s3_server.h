// A real S3-compatible server (moto, which checks signatures) of this test's own, on a free port; see s3_server.py.
// Runs with the Python of .venv, or with the one that FLEXKV_S3_PYTHON names.
#pragma once

#include <sys/types.h>

#include <string>

#include "flexkv/remote/location.h"

namespace flexkv::testing {

class S3Server {
 public:
  S3Server();
  ~S3Server();
  S3Server(const S3Server&) = delete;
  S3Server& operator=(const S3Server&) = delete;

  // Returns once it serves, on the same port. It begins empty each time, with other credentials.
  void start();
  void kill();
  // The next `count` requests meet it; the kinds are in s3_server.py.
  void fault(const std::string& kind, unsigned count) const;

  remote::S3Options user() const { return user_; }
  remote::S3Options role() const { return role_; }  // with a session token
  static constexpr const char* kUrl = "s3://bucket/some/prefix";

 private:
  const int port_;
  pid_t process_ = -1;
  remote::S3Options user_;
  remote::S3Options role_;
};

}  // namespace flexkv::testing
