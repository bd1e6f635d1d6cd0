#include <gtest/gtest.h>
#include <netdb.h>

#include <algorithm>
#include <latch>
#include <thread>

#include "flexkv/meta/backoff.h"
#include "flexkv/meta/redis_channel.h"
#include "flexkv/meta/request.h"

namespace {

std::latch name_server_answers{1};

}  // namespace

// Of this program: before the C library's.
int getaddrinfo(const char*, const char*, const addrinfo*, addrinfo**) {
  name_server_answers.wait();
  return EAI_NONAME;
}

namespace flexkv::meta {
namespace {

TEST(RedisChannel, DoesNotWaitLongForANameThatNobodyTells) {
  RedisOptions options;
  options.host = "redis.test";
  options.connect_within = 20 * kMillisecond;
  RedisChannel channel(options, 1);
  Nanos now = kSecond;
  channel.step(now);
  EXPECT_EQ(channel.trouble(), "Redis at redis.test:6379: its name is not found in time");
  now = channel.wakeup();
  channel.step(now);
  EXPECT_EQ(channel.trouble(), "Redis at redis.test:6379: its name is still being looked up");
  name_server_answers.count_down();
  while (channel.trouble().find("cannot connect") == std::string::npos) {
    now = channel.wakeup();
    channel.step(now);
    std::this_thread::yield();
  }
}

TEST(Backoff, DoublesUpToItsBoundAndBeginsAnewAfterASuccess) {
  Backoff backoff(100, 1000, 1);
  for (const Nanos most : {100, 200, 400, 800, 1000, 1000}) {
    const Nanos wait = backoff.failed();
    EXPECT_GE(wait, most / 2);
    EXPECT_LE(wait, most);
  }
  backoff.succeeded();
  EXPECT_LE(backoff.failed(), 100);
}

TEST(Backoff, NodesDoNotComeBackTogether) {
  std::vector<Nanos> waits;
  for (std::uint64_t seed = 0; seed < 100; ++seed) waits.push_back(Backoff(kSecond, kSecond, seed).failed());
  std::sort(waits.begin(), waits.end());
  EXPECT_EQ(std::unique(waits.begin(), waits.end()), waits.end());
}

TEST(EntryId, ComesBackAndNothingElseDoes) {
  EXPECT_EQ(entry_number(entry_id(7)), 7U);
  EXPECT_EQ(entry_number(entry_id(UINT64_MAX)), UINT64_MAX);
  for (const char* other : {"", "7", "7-1", "-0", "7-00", "1700000000000-3", "99999999999999999999-0"}) {
    EXPECT_EQ(entry_number(other), 0U) << other;
  }
}

}  // namespace
}  // namespace flexkv::meta
