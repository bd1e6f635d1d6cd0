// The part of NodeServer that ends its work without a loss, and stays.
#include <string>

#include "flexkv/base/log.h"
#include "flexkv/server/node_server.h"

namespace flexkv::server {

void NodeServer::drain(Nanos timeout) {
  MutexLock lock(mutex_);
  const Nanos now = monotonic_now();
  if (!drain_) {
    log_info("node " + options_.name + " drains: nothing is found or saved here any more");
    drain_ = Drain{now, now, now};
    node_.drain(now, now + timeout);
    // Who has found blocks here has a load's time to come for them; nobody finds any once Redis was told.
    if (cluster_ != nullptr && cluster_->drain()) drain_->lends_until += options_.node.lease_time;
    advance_drain(now);
  } else {
    node_.drain(now, now + timeout);
  }
  drain_->deadline = now + timeout;
  ipc::ring_eventfd(wake_.get());
}

bool NodeServer::wait_drained() const {
  MutexLock lock(mutex_);
  while (!node_.undone().none()) {
    const Nanos left = drain_->deadline - monotonic_now();
    if (left <= 0) return false;
    done_.wait_for(mutex_, std::chrono::nanoseconds(left));
  }
  return true;
}

void NodeServer::advance_drain(Nanos now) {
  if (now >= drain_->lends_until) node_.stop_lending();
  // What only ends later, as loads of what was found before, makes it no other node.
  if (cluster_ != nullptr && !drain_->told && node_.undone().none()) {
    drain_->told = true;
    cluster_->tell_drained();
  }
  done_.notify_all();
}

DrainStatus NodeServer::drain_status(Nanos now) const {
  DrainStatus status;
  status.lasts = now - drain_->begun;
  status.undone = node_.undone();
  status.state = status.undone.none()     ? DrainStatus::State::kDrained
                 : now < drain_->deadline ? DrainStatus::State::kDraining
                                          : DrainStatus::State::kLate;
  return status;
}

}  // namespace flexkv::server
