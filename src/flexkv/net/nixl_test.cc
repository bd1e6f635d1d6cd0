// The real NIXL; where it is not installed, these tests say so. FLEXKV_TEST_NIXL: path of libnixl_capi.so.
#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>
#include <thread>

#include "flexkv/base/prng.h"
#include "flexkv/net/nixl_agent.h"

namespace flexkv::net {
namespace {

std::vector<std::byte> random_bytes(std::size_t count, std::uint64_t seed) {
  std::vector<std::byte> bytes(count);
  Prng random(seed);
  for (auto& byte : bytes) byte = static_cast<std::byte>(random.next());
  return bytes;
}

auto handler_of_hangup() {
  struct sigaction action {};
  FLEXKV_ASSERT(::sigaction(SIGHUP, nullptr, &action) == 0);
  return action.sa_handler;
}
const auto kHandlerAtStart = handler_of_hangup();  // before UCX is loaded, which happens once

NixlAgent::Progress wait(NixlAgent::Transfer& transfer) {
  while (transfer.poll() == NixlAgent::Progress::kUnderWay) std::this_thread::yield();
  return transfer.poll();
}

TEST(NixlLibrary, ThatIsMissingSaysWhatToInstall) {
  const auto missing = NixlLibrary::load("/nowhere/libnixl_capi.so");
  ASSERT_FALSE(missing.ok());
  EXPECT_NE(missing.error().message.find("/nowhere/libnixl_capi.so"), std::string::npos);
  EXPECT_NE(missing.error().message.find("pip install nixl-cu13"), std::string::npos);
  const auto other = NixlLibrary::load("libc.so.6");
  ASSERT_FALSE(other.ok());
  EXPECT_NE(other.error().message.find("has no nixl_capi_"), std::string::npos);
}

class Nixl : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* const path = std::getenv("FLEXKV_TEST_NIXL");
    if (path == nullptr) GTEST_SKIP() << "FLEXKV_TEST_NIXL does not say where libnixl_capi.so is";
    library.emplace(NixlLibrary::load(path).value());
  }
  std::unique_ptr<NixlAgent> agent(const std::string& name) { return NixlAgent::create(*library, name).value(); }

  std::optional<NixlLibrary> library;
};

TEST_F(Nixl, ReadsWhatAnotherAgentRegisteredAndNothingElse) {
  auto memory = random_bytes(3U << 20, 1);
  std::vector<std::byte> into(1U << 20);
  const auto owner = agent("owner");
  const auto reader = agent("reader");
  ASSERT_TRUE(owner->register_memory(memory).ok());
  ASSERT_TRUE(reader->register_memory(into).ok());
  EXPECT_FALSE(reader->read("owner", reinterpret_cast<std::uintptr_t>(memory.data()), into).ok());
  ASSERT_TRUE(reader->add("owner", owner->metadata().value()).ok());
  for (const std::size_t offset : {std::size_t{0}, std::size_t{12'345}, memory.size() - into.size()}) {
    auto transfer = reader->read("owner", reinterpret_cast<std::uintptr_t>(memory.data() + offset), into).value();
    ASSERT_EQ(wait(transfer), NixlAgent::Progress::kDone);
    EXPECT_TRUE(std::equal(into.begin(), into.end(), memory.begin() + static_cast<std::ptrdiff_t>(offset)));
  }
  EXPECT_FALSE(reader->read("owner", reinterpret_cast<std::uintptr_t>(memory.data() + memory.size()), into).ok());
}

TEST_F(Nixl, LeavesTheProcessItsSignals) {
  const auto one = agent("one");
  EXPECT_EQ(handler_of_hangup(), kHandlerAtStart);
}

TEST_F(Nixl, RefusesMetadataOfAnotherNameAndNonsense) {
  auto memory = random_bytes(4096, 2);
  const auto owner = agent("owner");
  const auto reader = agent("reader");
  ASSERT_TRUE(owner->register_memory(memory).ok());
  const auto metadata = owner->metadata().value();
  EXPECT_FALSE(reader->add("somebody", metadata).ok());
  EXPECT_FALSE(reader->add("owner", random_bytes(metadata.size(), 3)).ok());
  EXPECT_FALSE(reader->add("owner", std::span(metadata).first(metadata.size() / 2)).ok());
  EXPECT_TRUE(reader->add("owner", metadata).ok());
}

}  // namespace
}  // namespace flexkv::net
