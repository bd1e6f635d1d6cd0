// The directory's lane and a real redis-server: processes killed, Redis killed, restarted empty and frozen, wrong
// passwords, equal names. Nothing here is about time: what must come is waited for, as long as it takes.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <map>
#include <random>
#include <thread>

#include "flexkv/cluster/directory_lane.h"
#include "redis_server.h"

namespace flexkv::cluster {
namespace {

using testing::RedisServer;

constexpr SpaceId kSpace{7};
constexpr std::uint8_t kHost = 0;
constexpr std::uint8_t kDisk = 1;

key::BlockKey key_of(std::uint64_t number) { return {number, Prng::mix(number)}; }

std::vector<key::BlockKey> keys_of(std::uint64_t first, std::uint64_t count) {
  std::vector<key::BlockKey> keys;
  for (std::uint64_t k = first; k < first + count; ++k) keys.push_back(key_of(k));
  return keys;
}

template <typename Condition>
void wait_until(Condition condition) {
  while (!condition()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

// A node's index, as far as the directory sees it.
class Index final : public ChangeSource {
 public:
  void attach(DirectoryLane* lane) { lane_ = lane; }
  void add(std::uint8_t tier, const std::vector<key::BlockKey>& keys) { change(Change::Kind::kAdded, tier, keys); }
  void take(std::uint8_t tier, const std::vector<key::BlockKey>& keys) { change(Change::Kind::kRemoved, tier, keys); }
  void clear() { change(Change::Kind::kCleared, 0, {key::BlockKey{}}); }

  bool read(std::vector<Change>& out) override {
    MutexLock lock(mutex_);
    for (int i = 0; i < 4096 && !changes_.empty(); ++i) {
      out.push_back(changes_.front());
      changes_.pop_front();
    }
    return !changes_.empty();
  }

 private:
  void change(Change::Kind kind, std::uint8_t tier, const std::vector<key::BlockKey>& keys) {
    {
      MutexLock lock(mutex_);
      for (const key::BlockKey& key : keys) changes_.push_back({kind, tier, 0, key});
    }
    lane_.load()->wake();
  }

  Mutex mutex_;
  std::deque<Change> changes_ FLEXKV_GUARDED_BY(mutex_);
  std::atomic<DirectoryLane*> lane_ = nullptr;
};

class TestNode {
 public:
  TestNode(const meta::RedisOptions& redis, const std::string& name, Nanos time_to_live = 2 * kSecond) {
    DirectoryLaneOptions options;
    options.redis = redis;
    options.directory.name = name;
    options.directory.incarnation = incarnation = std::random_device()() + 1ULL;
    options.directory.time_to_live = time_to_live;
    options.directory.limits.publish_after = 10 * kMillisecond;
    const auto reset = [this](Epoch) {
      ++resets;
      index.clear();
    };
    auto started = DirectoryLane::start(options, index, reset, [](auto) {});
    FLEXKV_ASSERT(started.ok());
    lane = std::move(started).value();
    index.attach(lane.get());
    FLEXKV_ASSERT(lane->add_space(kSpace) == 0U);
  }
  ~TestNode() { lane->stop(kSecond); }

  // Of the keys from the first on, as many as that node has; 0 if it is not found.
  std::uint32_t found_at(const TestNode& other, const std::vector<key::BlockKey>& keys) const {
    return found_at(other.incarnation, keys);
  }
  std::uint32_t found_at(Incarnation node, const std::vector<key::BlockKey>& keys) const {
    for (const auto& holding : lookup(keys)) {
      if (holding.node == node) return holding.blocks;
    }
    return 0;
  }
  std::vector<Replica::Holding> lookup(const std::vector<key::BlockKey>& keys) const {
    std::vector<Replica::Holding> holdings;
    lane->replica().lookup(0, keys, monotonic_now(), holdings);
    return holdings;
  }

  Incarnation incarnation = 0;
  std::atomic<int> resets = 0;
  Index index;
  std::unique_ptr<DirectoryLane> lane;
};

TEST(DirectoryRedis, NodesSeeWhatOthersAddAndRemove) {
  RedisServer redis;
  TestNode a(redis.over_socket(), "a");
  TestNode b(redis.over_tcp(), "b");
  const auto keys = keys_of(0, 100);
  a.index.add(kHost, keys);
  a.index.add(kDisk, keys_of(0, 40));
  wait_until([&] { return b.found_at(a, keys) == 100; });
  wait_until([&] { return b.lookup(keys)[0].in_tier[kDisk] == 40; });
  EXPECT_EQ(b.lookup(keys)[0].in_tier[kHost], 100U);
  EXPECT_TRUE(a.lookup(keys).empty());
  a.index.take(kHost, keys_of(60, 40));
  wait_until([&] { return b.found_at(a, keys) == 60; });
  b.index.add(kHost, keys_of(0, 10));
  wait_until([&] { return a.found_at(b, keys) == 10; });
  a.index.clear();
  wait_until([&] { return b.found_at(a, keys) == 0; });
}

TEST(DirectoryRedis, ANodeThatComesLateLoadsASnapshot) {
  RedisServer redis;
  TestNode a(redis.over_socket(), "a");
  constexpr std::uint64_t kBlocks = 300'000;
  const auto keys = keys_of(0, kBlocks);
  a.index.add(kHost, keys);
  wait_until([&] { return a.lane->status().directory.blocks_told == kBlocks; });
  std::uint64_t snapshots = 0;
  while (snapshots == 0) {  // the first may come before a's heartbeat tells of one
    TestNode b(redis.over_socket(), "b");
    wait_until([&] { return b.found_at(a, keys) == kBlocks; });
    snapshots = b.lane->status().directory.followed.snapshots;
    EXPECT_EQ(b.lane->status().replica.blocks, kBlocks);
  }
}

TEST(DirectoryRedis, ANodeThatLeavesIsNotFoundAnyMore) {
  RedisServer redis;
  constexpr Nanos kHour = 3600 * kSecond;  // it does not just age out
  TestNode b(redis.over_socket(), "b", kHour);
  const auto keys = keys_of(0, 10);
  Incarnation gone = 0;
  {
    TestNode a(redis.over_socket(), "a", kHour);
    gone = a.incarnation;
    a.index.add(kHost, keys);
    wait_until([&] { return b.found_at(a, keys) == 10; });
  }
  wait_until([&] { return b.found_at(gone, keys) == 0; });
}

TEST(DirectoryRedis, BlocksOfAKilledProcessAgeOut) {
  RedisServer redis;
  const pid_t child = ::fork();
  if (child == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    TestNode a(redis.over_socket(), "a");
    a.index.add(kHost, keys_of(0, 10));
    while (true) ::pause();
  }
  TestNode b(redis.over_socket(), "b");
  wait_until([&] { return b.lookup(keys_of(0, 10)).size() == 1; });
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  wait_until([&] { return b.lookup(keys_of(0, 10)).empty(); });
  wait_until([&] { return b.lane->status().replica.nodes == 0; });
}

TEST(DirectoryRedis, SurvivesARedisThatIsKilledAndComesBackEmpty) {
  RedisServer redis;
  constexpr Nanos kMinute = 60 * kSecond;
  TestNode a(redis.over_socket(), "a", kMinute);
  TestNode b(redis.over_tcp(), "b", kMinute);
  a.index.add(kHost, keys_of(0, 10));
  wait_until([&] { return b.found_at(a, keys_of(0, 10)) == 10; });
  redis.kill();
  a.index.add(kHost, keys_of(10, 10));
  wait_until([&] { return !a.lane->status().trouble.empty() && !b.lane->status().trouble.empty(); });
  EXPECT_EQ(b.found_at(a, keys_of(0, 10)), 10U) << "what is known stays known until the time to live is over";
  redis.start();
  wait_until([&] { return b.found_at(a, keys_of(0, 20)) == 20; });
  TestNode late(redis.over_socket(), "late", kMinute);
  wait_until([&] { return late.found_at(a, keys_of(0, 20)) == 20; });
}

TEST(DirectoryRedis, WhileRedisIsAwayTheReplicaAgesOut) {
  RedisServer redis;
  TestNode a(redis.over_socket(), "a");
  TestNode b(redis.over_socket(), "b");
  const auto keys = keys_of(0, 10);
  a.index.add(kHost, keys);
  wait_until([&] { return b.found_at(a, keys) == 10; });
  redis.kill();
  wait_until([&] { return b.found_at(a, keys) == 0; });
  redis.start();
  wait_until([&] { return b.found_at(a, keys) == 10; });
}

TEST(DirectoryRedis, ARedisThatHangsIsGivenUpAndUsedAgain) {
  RedisServer redis;
  meta::RedisOptions options = redis.over_socket();
  options.answer_within = 200 * kMillisecond;
  TestNode a(options, "a");
  TestNode b(options, "b");
  a.index.add(kHost, keys_of(0, 10));
  wait_until([&] { return b.found_at(a, keys_of(0, 10)) == 10; });
  redis.freeze();
  a.index.add(kHost, keys_of(10, 10));
  wait_until([&] { return a.lane->status().trouble.find("in time") != std::string::npos; });
  wait_until([&] { return b.found_at(a, keys_of(0, 10)) == 0; });
  redis.thaw();
  wait_until([&] { return b.found_at(a, keys_of(0, 20)) == 20; });
}

TEST(DirectoryRedis, AWrongPasswordIsSaidAndNotShown) {
  RedisServer redis("open-sesame");
  for (const std::string& password : {std::string("open-barley"), std::string()}) {
    meta::RedisOptions options = redis.over_tcp();
    options.password = password;
    TestNode node(options, "a");
    wait_until([&] { return !node.lane->status().trouble.empty(); });
    const std::string trouble = node.lane->status().trouble;
    EXPECT_NE(trouble.find("redis_password"), std::string::npos) << trouble;
    EXPECT_EQ(trouble.find("open-"), std::string::npos) << trouble;
    EXPECT_FALSE(node.lane->status().directory.joined);
  }
  TestNode a(redis.over_tcp(), "a");
  TestNode b(redis.over_socket(), "b");
  a.index.add(kHost, keys_of(0, 10));
  wait_until([&] { return b.found_at(a, keys_of(0, 10)) == 10; });
}

TEST(DirectoryRedis, NodesWithOneNameAreBothServedAndSayIt) {
  RedisServer redis;
  TestNode a(redis.over_socket(), "same");
  TestNode b(redis.over_socket(), "same");
  TestNode reader(redis.over_socket(), "reader");
  a.index.add(kHost, keys_of(0, 10));
  b.index.add(kHost, keys_of(0, 20));
  wait_until([&] { return reader.found_at(a, keys_of(0, 20)) == 10 && reader.found_at(b, keys_of(0, 20)) == 20; });
  EXPECT_EQ(reader.lookup(keys_of(0, 20))[0].node, b.incarnation) << "the longest comes first";
  wait_until([&] { return a.lane->status().directory.same_name == 1 && b.lane->status().directory.same_name == 1; });
  EXPECT_EQ(reader.lane->status().directory.same_name, 0U);
}

TEST(DirectoryRedis, AResetOfTheClusterReachesEveryNode) {
  RedisServer redis;
  TestNode a(redis.over_socket(), "a");
  TestNode b(redis.over_socket(), "b");
  a.index.add(kHost, keys_of(0, 10));
  wait_until([&] { return b.found_at(a, keys_of(0, 10)) == 10; });
  b.lane->reset_cluster(1);
  wait_until([&] { return a.resets == 1 && b.resets == 1; });
  a.index.add(kHost, keys_of(100, 5));
  wait_until([&] { return b.found_at(a, keys_of(100, 5)) == 5; });
  EXPECT_EQ(b.found_at(a, keys_of(0, 10)), 0U);
  TestNode late(redis.over_socket(), "late");
  wait_until([&] { return late.found_at(a, keys_of(100, 5)) == 5; });
  EXPECT_EQ(late.resets, 1) << "the lane does not know that it has nothing of before";
}

TEST(DirectoryRedis, DeploymentsShareOneRedis) {
  RedisServer redis;
  TestNode a(redis.over_socket(), "a");
  Index index;
  DirectoryLaneOptions options;
  options.redis = redis.over_socket();
  options.directory.cluster = "other";
  options.directory.incarnation = 5;
  auto other = DirectoryLane::start(
      options, index, [](Epoch) {}, [](auto) {});
  ASSERT_TRUE(other.ok());
  index.attach(other.value().get());
  ASSERT_EQ(other.value()->add_space(kSpace), 0U);
  a.index.add(kHost, keys_of(0, 10));
  TestNode b(redis.over_socket(), "b");
  wait_until([&] { return b.found_at(a, keys_of(0, 10)) == 10; });
  wait_until([&] { return other.value()->status().directory.joined; });
  EXPECT_EQ(other.value()->status().directory.peers, 0U);
}

TEST(DirectoryRedis, AKeyThatSomethingElseUsesIsAnErrorNotACrash) {
  RedisServer redis;
  meta::RedisChannel channel(redis.over_socket(), 1);
  const auto ask = [&](const meta::Request& request) {
    wait_until([&] { return channel.step(monotonic_now()), channel.ready(); });
    channel.submit(request, monotonic_now());
    std::optional<Result<meta::Answers>> answer;
    wait_until([&] {
      channel.step(monotonic_now());
      answer = channel.take_answer();
      return answer.has_value();
    });
    return *answer;
  };
  ASSERT_TRUE(ask({meta::put("text", "x", 0), meta::put_part("parts", 3, "y")}).ok());
  const auto refused = ask({meta::members("text")});
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.error().message.find("WRONGTYPE"), std::string::npos) << refused.error().message;
  const auto answers = ask({meta::get("text"), meta::get_part("parts", 3), meta::get_part("parts", 4)});
  ASSERT_TRUE(answers.ok());
  EXPECT_EQ(answers.value()[0].value, "x");
  EXPECT_EQ(answers.value()[1].value, "y");
  EXPECT_FALSE(answers.value()[2].found);
  // The same number again has no effect, also with another value; so a request may be repeated.
  ASSERT_TRUE(ask({meta::append("stream", 5, "first"), meta::append("stream", 5, "second")}).ok());
  const auto read = ask({meta::read({{"stream", "0-0"}}, 10, kSecond)});
  ASSERT_TRUE(read.ok());
  ASSERT_EQ(read.value()[0].entries.size(), 1U);
  EXPECT_EQ(read.value()[0].entries[0].value, "first");
  EXPECT_EQ(read.value()[0].entries[0].id, "5-0");
}

}  // namespace
}  // namespace flexkv::cluster
