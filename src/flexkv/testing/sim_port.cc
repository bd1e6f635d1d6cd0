#include "flexkv/testing/sim_port.h"

#include <utility>

#include "flexkv/testing/sim_world.h"

namespace flexkv::testing {

SimPort::SimPort(SimWorld& world, proto::ClientHello hello) : world_(world), hello_(std::move(hello)) {
  connect_after(0);
}

SimPort::~SimPort() {
  *alive_ = false;
  lose_connection();
}

bool SimPort::embedded() const { return world_.plan().embedded_port; }

Nanos SimPort::reuse_time() const { return world_.plan().reuse_time; }

SimNode* SimPort::peer() const { return link_ && world_.epoch() == epoch_ ? world_.node() : nullptr; }

void SimPort::connect_after(Nanos delay) {
  world_.loop().after(delay, [this, alive = alive_] {
    if (*alive && !link_) connect();
  });
}

void SimPort::connect() {
  SimNode* const node = world_.node();
  auto link = node == nullptr || node->paused() ? nullptr : node->attach_client(hello_);
  if (link == nullptr) return connect_after(2 * kMillisecond);
  key_secret_ = node->key_secret();
  epoch_ = world_.epoch();
  link->deliver = [this, alive = alive_](const proto::JobResult& result) {
    if (*alive) arrived_.push_back(result);
  };
  link->lost = [this, alive = alive_, weak = std::weak_ptr(link)] {
    if (*alive && link_ == weak.lock()) lose_connection();
  };
  link_ = std::move(link);
  ++generation_;
}

// Our end is closed; the node notices later. A node that is gone itself does not.
void SimPort::lose_connection() {
  if (!link_) return;
  world_.loop().note("client: connection lost", link_->handle);
  link_->to_client->close();
  link_->hung_up = true;
  if (world_.loop().chance(500)) link_->to_node->close();  // else what was posted still arrives
  world_.loop().after(world_.loop().delay(world_.plan().message_delay + kMillisecond),
                      [&world = world_, epoch = epoch_, link = link_] {
                        if (world.node() != nullptr && world.epoch() == epoch) world.node()->drop(link);
                      });
  link_.reset();
  if (*alive_) connect_after(world_.loop().delay(5 * kMillisecond));
}

void SimPort::take_results() {
  for (const auto& result : std::exchange(arrived_, {})) {
    note(result.reason);
    ended_.push_back(result);
  }
}

std::vector<proto::JobResult> SimPort::take_ended_jobs() {
  if (link_) take_results();
  return std::exchange(ended_, {});
}

bool SimPort::wait_ended_jobs(Nanos) {
  if (link_) take_results();
  return !ended_.empty() || !link_;
}

bool SimPort::served(Nanos) {
  const auto reason = lookup({0, 0, 0, {}}).reason;
  return reason != proto::Reason::kNoNode && reason != proto::Reason::kNotReady;
}

proto::LookupReply SimPort::lookup(proto::LookupRequest request) {
  const proto::LookupReply nothing{0, 0, proto::Reason::kNoNode, 0, 0};
  SimLoop& loop = world_.loop();
  if (peer() == nullptr) return nothing;
  if (world_.plan().embedded_port) {
    const auto reply = peer()->lookup(link_->handle, request);
    note(reply.reason);
    return reply;
  }
  if (loop.chance(world_.plan().ring_full)) return nothing;
  if (peer()->paused() || loop.chance(world_.plan().lookup_timeout)) {
    loop.note("client: lookup timed out", link_->handle, request.sequence);
    (void)post(request);
    return nothing;
  }
  link_->to_node->flush();
  const auto reply = peer()->lookup(link_->handle, request);
  take_results();
  note(reply.reason);
  return reply;
}

bool SimPort::post(const proto::FromClient& message) {
  if (peer() == nullptr) return false;
  if (world_.plan().embedded_port) {
    const auto reason = peer()->apply(link_->handle, message);
    note(reason);
    return reason != proto::Reason::kNotReady && reason != proto::Reason::kUnknownSequence;
  }
  take_results();
  if (world_.loop().chance(world_.plan().ring_full)) {
    world_.loop().note("client: ring full", link_->handle, message.index());
    return false;
  }
  link_->to_node->send([&world = world_, epoch = epoch_, link = link_, message] {
    if (world.node() != nullptr && world.epoch() == epoch) (void)world.node()->apply(link->handle, message);
  });
  return true;
}

}  // namespace flexkv::testing
