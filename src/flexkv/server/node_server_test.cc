#include "flexkv/server/node_server.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/inotify.h>
#include <sys/poll.h>
#include <sys/wait.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "flexkv/proto/messages.h"

namespace flexkv::server {
namespace {

constexpr std::uint32_t kBlockBytes = 4096;
constexpr proto::SequenceId kSequence = 1;

// A node with one engine, whose agent is a bare channel in the hands of the test.
class NodeServerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "flexkv-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    dir_ = name;
    NodeServerOptions options;
    options.node.pool_bytes = 16 * kBlockBytes;
    options.huge_pages = false;
    options.runtime_dir = dir_;
    options.name = "node";
    auto started = NodeServer::start(options);
    ASSERT_TRUE(started.ok()) << started.error().message;
    node_ = std::move(started).value();
    proto::ClientHello hello;
    hello.engine_id = "engine";
    engine_ = node_->attach_client(hello).value();
  }
  void TearDown() override {
    node_.reset();
    std::filesystem::remove_all(dir_);
  }

  NodeServerOptions with_drives(std::vector<std::string> directories) const {
    NodeServerOptions options;
    options.node.pool_bytes = 16 * kBlockBytes;
    options.runtime_dir = dir_;
    options.name = "drives";
    options.disk.bytes = 1U << 20;
    options.disk.directories = std::move(directories);
    return options;
  }

  ipc::Channel attach_agent() const {
    proto::AgentHello hello;
    hello.engine_id = "engine";
    hello.shard_bytes = kBlockBytes;
    hello.block_count = 64;
    ipc::Hello frame;
    frame.role = static_cast<std::uint32_t>(proto::Role::kAgent);
    frame.payload = proto::encode(hello);
    auto connected = ipc::Channel::connect(node_->socket_path(), frame, 60 * kSecond);
    EXPECT_TRUE(connected.ok()) << connected.error().message;
    return std::move(connected.value().channel);
  }

  // Orders a save of two blocks, which the agent is told of and does not carry out.
  void order_save(proto::JobId job) {
    proto::TransferRequest request;
    request.save = true;
    request.sequence = kSequence;
    request.job = job;
    request.keys = {{1, 1}, {2, 2}};
    request.device_blocks = {0, 1};
    ASSERT_EQ(node_->post(engine_, request), proto::Reason::kNone);
    ASSERT_EQ(reserved(), 2U);
  }

  std::uint64_t reserved() const {
    std::uint64_t sum = 0;
    const auto status = nlohmann::json::parse(node_->status_json());
    for (const auto& space : status.at("spaces")) sum += space.at("reserved").get<std::uint64_t>();
    return sum;
  }
  bool becomes_free() const {
    for (int i = 0; i < 6000 && reserved() != 0; ++i) ::poll(nullptr, 0, 10);
    return reserved() == 0;
  }

  std::string dir_;
  std::unique_ptr<NodeServer> node_;
  node::EngineHandle engine_ = 0;
};

bool told_to_go(const ipc::Channel& channel) {
  pollfd socket{channel.socket_fd(), POLLIN, 0};
  return ::poll(&socket, 1, 60'000) == 1 && channel.peer_gone();
}

TEST_F(NodeServerTest, BlocksOfAnExpelledAgentStayTakenUntilItHasLetGo) {
  {
    ipc::Channel agent = attach_agent();
    order_save(7);
    const std::array<std::byte, 3> nonsense{};
    ASSERT_TRUE(agent.send(nonsense));
    ASSERT_TRUE(told_to_go(agent));
    EXPECT_EQ(reserved(), 2U);
  }
  EXPECT_TRUE(becomes_free());
  ipc::Channel again = attach_agent();
  order_save(8);
}

TEST_F(NodeServerTest, SoDoThoseOfAnAgentThatTalksOnTheSocket) {
  {
    ipc::Channel agent = attach_agent();
    order_save(7);
    ASSERT_EQ(::send(agent.socket_fd(), "x", 1, 0), 1);
    ASSERT_TRUE(told_to_go(agent));
    EXPECT_EQ(reserved(), 2U);
  }
  EXPECT_TRUE(becomes_free());
}

TEST_F(NodeServerTest, ASecondNodeOfTheSameNameSaysWhoHasIt) {
  NodeServerOptions options;
  options.node.pool_bytes = kBlockBytes;
  options.runtime_dir = dir_;
  options.name = "node";
  const auto second = NodeServer::start(options);
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.error().code, ErrorCode::kPeer);
  EXPECT_EQ(second.error().message,
            "node 'node' already runs (process " + std::to_string(::getpid()) + "); stop it or give another --name");
}

TEST_F(NodeServerTest, IsSeenByNobodyWhenItsPoolDoesNotFit) {
  const Fd watch(::inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
  ASSERT_GE(::inotify_add_watch(watch.get(), dir_.c_str(), IN_CREATE | IN_MOVED_TO), 0);
  NodeServerOptions options;
  options.node.pool_bytes = 1ULL << 50;
  options.runtime_dir = dir_;
  options.name = "large";
  const auto refused = NodeServer::start(options);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ErrorCode::kNoSpace);
  std::string seen(4096, '\0');
  const ssize_t size = ::read(watch.get(), seen.data(), seen.size());
  ASSERT_GT(size, 0);  // its lock
  EXPECT_EQ(seen.find("large.sock"), std::string::npos);
}

TEST_F(NodeServerTest, ResetsAreCounted) {
  const auto resets = [&] { return nlohmann::json::parse(node_->status_json()).at("node").at("resets"); };
  EXPECT_EQ(resets(), 0);
  node_->reset_all();
  (void)node_->post(engine_, proto::ResetRequest{});
  EXPECT_EQ(resets(), 2);
}

TEST_F(NodeServerTest, WithDrivesItSaysWhatAdmissionDid) {
  NodeServerOptions options = with_drives({dir_ + "/ssd"});
  const auto admission = [&] {
    const auto node = NodeServer::start(options);
    return nlohmann::json::parse(node.value()->status_json()).at("disk").value("admission", nlohmann::json());
  };
  EXPECT_EQ(admission(), (nlohmann::json{{"admitted", 0}, {"refused_unlikely", 0}}));
  options.node.disk_admission = false;
  EXPECT_TRUE(admission().is_null());
}

TEST_F(NodeServerTest, ASsdCacheWithoutAUsableDirectoryIsOff) {
  NodeServerOptions options = with_drives({"/dev/null/a", dir_ + "/ssd"});
  EXPECT_NE(NodeServer::start(options).value()->describe().find("SSD cache in 1 directories of 2"), std::string::npos);
  options.disk.directories = {"/dev/null/a", "/dev/null/b"};
  EXPECT_NE(NodeServer::start(options).value()->describe().find("SSD cache OFF"), std::string::npos);
}

TEST_F(NodeServerTest, AnAgentThatDiesIsGoneEvenIfItsChildHoldsItsSocket) {
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t parent = ::fork();
  if (parent == 0) {
    const ipc::Channel agent = attach_agent();
    const pid_t child = ::fork();
    if (child == 0) {
      ::poll(nullptr, 0, 60'000);
      ::_exit(0);
    }
    (void)!::write(ready[1], &child, sizeof child);
    ::poll(nullptr, 0, 60'000);
    ::_exit(0);
  }
  pid_t child = 0;
  ASSERT_EQ(::read(ready[0], &child, sizeof child), static_cast<ssize_t>(sizeof child));
  order_save(7);
  ::kill(parent, SIGKILL);
  ::waitpid(parent, nullptr, 0);
  EXPECT_TRUE(becomes_free());
  ::kill(child, SIGKILL);
  ::close(ready[0]);
  ::close(ready[1]);
}

}  // namespace
}  // namespace flexkv::server
