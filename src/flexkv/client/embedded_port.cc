#include "flexkv/client/node_port.h"

namespace flexkv::client {
namespace {

class EmbeddedPort final : public NodePort {
 public:
  EmbeddedPort(server::NodeServer& node, node::EngineHandle engine) : node_(node), engine_(engine) {}
  ~EmbeddedPort() override { node_.detach_client(engine_); }

  std::uint64_t generation() override { return generation_; }
  const std::array<std::uint8_t, 32>& key_secret() override { return node_.key_secret(); }
  Nanos reuse_time() const override { return 0; }
  std::vector<proto::JobResult> take_ended_jobs() override { return node_.take_ended_jobs(engine_); }
  bool wait_ended_jobs(Nanos timeout) override { return node_.wait_ended_jobs(engine_, timeout); }
  bool served(Nanos timeout) override { return node_.wait_ready(engine_, timeout); }

  proto::LookupReply lookup(proto::LookupRequest request) override {
    const auto found = node_.lookup(engine_, request);
    note(found.reason);
    return {request.request,   found.matched_blocks, found.reason,
            found.disk_blocks, found.host_blocks,    found.described_blocks};
  }

  std::vector<events::Change> take_changes() override {
    std::vector<events::Change> changes;
    (void)node_.read_changes(subscription_, engine_, changes);  // the rest next time: this is the scheduler's thread
    return changes;
  }

  bool post(const proto::FromClient& message) override {
    const proto::Reason reason = node_.post(engine_, message);
    note(reason);
    if (std::holds_alternative<proto::PrefetchRequest>(message)) return reason == proto::Reason::kNone;
    return reason != proto::Reason::kNotReady && reason != proto::Reason::kUnknownSequence;
  }

  void hang_up() override {}  // post() reaches the node always

 private:
  // The node forgets an engine's sequences when one of its ranks detaches: all keys are then sent again.
  void note(proto::Reason reason) { generation_ += reason == proto::Reason::kUnknownSequence; }

  server::NodeServer& node_;
  const node::EngineHandle engine_;
  std::uint64_t generation_ = 1;
  events::Subscription subscription_;
};

}  // namespace

Result<std::unique_ptr<NodePort>> open_embedded_port(server::NodeServer& node, const proto::ClientHello& hello) {
  const auto engine = node.attach_client(hello);
  if (!engine) return engine.error();
  return std::unique_ptr<NodePort>(std::make_unique<EmbeddedPort>(node, engine.value()));
}

}  // namespace flexkv::client
