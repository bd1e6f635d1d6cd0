// The client's way to the simulated node: like the remote port (posted messages, one answer waited for) or like the
// embedded one (calls), with lost connections, full rings and answers that come too late. Owned by one thread.
#pragma once

#include <memory>
#include <vector>

#include "flexkv/client/node_port.h"
#include "flexkv/testing/sim_node.h"

namespace flexkv::testing {

class SimWorld;

class SimPort final : public client::NodePort {
 public:
  SimPort(SimWorld& world, proto::ClientHello hello);
  ~SimPort() override;

  std::uint64_t generation() override { return link_ ? generation_ : 0; }
  const std::array<std::uint8_t, 32>& key_secret() override { return key_secret_; }
  proto::LookupReply lookup(proto::LookupRequest request) override;
  bool post(const proto::FromClient& message) override;
  void hang_up() override {
    if (!embedded()) lose_connection();
  }
  std::vector<proto::JobResult> take_ended_jobs() override;
  // No time passes within a call.
  bool wait_ended_jobs(Nanos timeout) override;
  bool served(Nanos timeout) override;
  Nanos reuse_time() const override;

  void lose_connection();

 private:
  bool embedded() const;
  void connect_after(Nanos delay);
  void connect();
  void take_results();
  void note(proto::Reason reason) { generation_ += reason == proto::Reason::kUnknownSequence; }
  // The node that we are connected to; null once it is gone, noticed or not.
  SimNode* peer() const;

  SimWorld& world_;
  const proto::ClientHello hello_;
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  std::shared_ptr<ClientLink> link_;
  std::uint64_t epoch_ = 0;  // of the node at its other end
  std::array<std::uint8_t, 32> key_secret_{};
  std::uint64_t generation_ = 0;
  std::vector<proto::JobResult> arrived_;
  std::vector<proto::JobResult> ended_;
};

}  // namespace flexkv::testing
