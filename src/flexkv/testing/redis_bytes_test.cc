#include "flexkv/testing/redis_bytes.h"

#include <gtest/gtest.h>

#include "flexkv/meta/redis_command.h"

namespace flexkv::testing {
namespace {

TEST(RedisBytes, RequestsAreAsLongAsTheyAreSent) {
  std::vector<meta::Position> positions;
  for (std::uint64_t i = 0; i < 120; ++i) positions.push_back({"stream" + std::to_string(i), meta::entry_id(i * i)});
  for (const std::size_t count : {1U, 2U, 48U, 120U}) {
    const meta::Request request{meta::get("key"),
                                meta::read({positions.begin(), positions.begin() + static_cast<long>(count)}, 3, 1),
                                meta::read({positions.front()}, 1, 0)};
    std::string sent;
    for (const meta::Op& op : request) meta::append_command(meta::words_of(op), sent);
    EXPECT_EQ(request_bytes(request), sent.size());
  }
}

// As a Redis server writes them.
TEST(RedisBytes, Answers) {
  const std::string entry = "*2\r\n$3\r\n7-0\r\n*2\r\n$1\r\nb\r\n$4\r\nwxyz\r\n";
  const auto expect = [](const meta::Op& op, const meta::Answer& answer, const std::string& reply) {
    EXPECT_EQ(answer_bytes({op}, {answer}), reply.size()) << reply;
  };
  expect(meta::get("k"), {true, "value", {}, {}}, "$5\r\nvalue\r\n");
  expect(meta::get("k"), {}, "$-1\r\n");
  expect(meta::put("k", "v", 0), {}, "+OK\r\n");
  expect(meta::touch("k", 1), {}, ":1\r\n");
  expect(meta::members("k"), {false, "", {"a", "bc"}, {}}, "*2\r\n$1\r\na\r\n$2\r\nbc\r\n");
  expect(meta::append("k", 7, "wxyz"), {}, "$3\r\n7-0\r\n");
  const meta::Op read = meta::read({{"first", "0-0"}, {"second", "0-0"}}, 2, 0);
  expect(read, {}, "*-1\r\n");
  expect(read, {false, "", {}, {{1, "7-0", "wxyz"}}}, "*1\r\n*2\r\n$6\r\nsecond\r\n*1\r\n" + entry);
  expect(read, {false, "", {}, {{0, "7-0", "wxyz"}, {1, "7-0", "wxyz"}, {1, "7-0", "wxyz"}}},
         "*2\r\n*2\r\n$5\r\nfirst\r\n*1\r\n" + entry + "*2\r\n$6\r\nsecond\r\n*2\r\n" + entry + entry);
}

}  // namespace
}  // namespace flexkv::testing
