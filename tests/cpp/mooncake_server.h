// A real Mooncake Store of this test's own: its master, on free ports, and a process that lends memory; see
// mooncake_server.py. Runs with the Python that FLEXKV_TEST_MOONCAKE names.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "flexkv/remote/location.h"

namespace flexkv::testing {

class MooncakeServer {
 public:
  static bool possible();  // there is such a Python

  explicit MooncakeServer(std::uint64_t lent_bytes = 128 << 20);
  ~MooncakeServer();
  MooncakeServer(const MooncakeServer&) = delete;
  MooncakeServer& operator=(const MooncakeServer&) = delete;

  // Returns once it serves, on the same ports; it has forgotten all.
  void start_master();
  void kill_master();
  void start_holder();
  void kill_holder();
  void spoil() const { run("spoil"); }    // a byte of each object
  void remove() const { run("remove"); }  // all objects

  std::string url() const { return "mooncake://127.0.0.1:" + std::to_string(port_) + "/some/prefix"; }
  remote::MooncakeOptions options() const;

 private:
  void run(const std::string& what) const;

  const std::uint64_t lent_bytes_;
  const int port_;
  const int http_port_;
  pid_t master_ = -1;
  pid_t holder_ = -1;
};

}  // namespace flexkv::testing
