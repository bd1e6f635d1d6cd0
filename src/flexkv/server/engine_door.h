// Where schedulers on other machines reach this node, whose ranks here are a part of their engine: TLS connections with
// the messages of a client's channel (proto/host_frames.h).
//
// One thread of its own; it calls the node as an engine would that the node is embedded in.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <thread>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/net/tls.h"

namespace flexkv::server {

class NodeServer;

struct EngineDoorOptions {
  std::string listen;       // HOST:PORT; port 0: any
  std::string secret_file;  // see net::Secret
  std::string cluster = "default";
};

class EngineDoor {
 public:
  // Fails when the secret is not to be had, or the address. The node outlives the door.
  static Result<std::unique_ptr<EngineDoor>> open(const EngineDoorOptions& options, NodeServer& node);
  // The node forgets what those who came this way had under way.
  ~EngineDoor();

  const std::string& address() const { return address_; }  // ADDRESS:PORT

 private:
  class Visitor;

  EngineDoor(net::TlsContext tls, NodeServer& node);
  Status start(const std::string& listen);
  void run();
  void accept_visitors(Nanos now);
  void watch_listener(bool wanted);
  bool pump(Visitor& visitor, Nanos now);
  void show_out(int fd);
  int wait_milliseconds(Nanos now) const;

  const net::TlsContext tls_;
  NodeServer& node_;
  std::string address_;
  Fd epoll_;
  Fd wake_;  // stop, or jobs of visitors have ended
  Fd listener_;
  Nanos accept_at_ = 0;                               // 0: whenever somebody comes
  std::map<int, std::unique_ptr<Visitor>> visitors_;  // by descriptor
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace flexkv::server
