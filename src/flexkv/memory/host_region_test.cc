#include "flexkv/memory/host_region.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <fstream>
#include <iterator>
#include <thread>

#include "flexkv/memory/available_memory.h"

namespace flexkv::memory {
namespace {

constexpr HostRegion::Options kNormalPages{.huge_pages = false, .touch_threads = 4};

TEST(HostRegion, is_zeroed_writable_and_never_larger_than_asked) {
  Result<HostRegion> region = HostRegion::create(10'000'000, {});
  ASSERT_TRUE(region) << region.error().message;
  EXPECT_LE(region.value().bytes(), 10'000'000U);
  EXPECT_GT(region.value().bytes(), 10'000'000U - (2U << 20));
  ASSERT_TRUE(region.value().touch());
  for (std::size_t i = 0; i < region.value().bytes(); ++i) ASSERT_EQ(region.value().data()[i], std::byte{0});
  std::memset(region.value().data(), 7, region.value().bytes());
  EXPECT_NE(region.value().description().find("pages"), std::string::npos);
}

TEST(HostRegion, says_what_limits_the_size_of_its_file) {
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit low{1 << 20, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &low), 0);
  const Result<HostRegion> region = HostRegion::create(2 << 20, kNormalPages);
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  ASSERT_FALSE(region);
  EXPECT_NE(region.error().message.find("`ulimit -f`"), std::string::npos) << region.error().message;
}

TEST(HostRegion, another_mapping_sees_the_same_bytes) {
  Result<HostRegion> region = HostRegion::create(1 << 20, kNormalPages);
  ASSERT_TRUE(region) << region.error().message;
  Result<HostRegion> peer = HostRegion::map(Fd(dup(region.value().fd())), region.value().bytes());
  ASSERT_TRUE(peer) << peer.error().message;
  std::memset(region.value().data(), 42, region.value().bytes());
  EXPECT_EQ(std::memcmp(region.value().data(), peer.value().data(), peer.value().bytes()), 0);
}

TEST(HostRegion, cannot_be_shrunk_by_a_peer) {
  Result<HostRegion> region = HostRegion::create(1 << 20, kNormalPages);
  ASSERT_TRUE(region) << region.error().message;
  EXPECT_NE(ftruncate(region.value().fd(), 4096), 0);
  EXPECT_NE(ftruncate(region.value().fd(), 2 << 20), 0);
}

TEST(HostRegion, refuses_received_files_that_could_kill_us) {
  Fd unsealed(memfd_create("t", MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(unsealed.get(), 1 << 20), 0);
  Result<HostRegion> refused = HostRegion::map(Fd(dup(unsealed.get())), 1 << 20);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kPeer);
  ASSERT_EQ(fcntl(unsealed.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  EXPECT_TRUE(HostRegion::map(Fd(dup(unsealed.get())), 1 << 20));
  EXPECT_FALSE(HostRegion::map(Fd(dup(unsealed.get())), 2 << 20)) << "larger than the file";
  EXPECT_FALSE(HostRegion::map(Fd(dup(unsealed.get())), 100)) << "not whole pages";
  EXPECT_FALSE(HostRegion::map(Fd(dup(unsealed.get())), 0));
  EXPECT_FALSE(HostRegion::map(Fd(open("/dev/null", O_RDWR | O_CLOEXEC)), 4096));
  EXPECT_FALSE(HostRegion::map(Fd(), 4096));
}

TEST(HostRegion, refuses_more_than_the_machine_has_and_takes_nothing) {
  for (const std::uint64_t bytes : {std::uint64_t{0}, std::uint64_t{100}, ~std::uint64_t{0}}) {
    EXPECT_FALSE(HostRegion::create(bytes, {}));
  }
  const Result<HostRegion> refused = HostRegion::create(std::uint64_t{1} << 50, kNormalPages);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kNoSpace);
  EXPECT_NE(refused.error().message.find("1125899906842624 bytes"), std::string::npos) << refused.error().message;
  EXPECT_NE(refused.error().message.find("after 0 KiB"), std::string::npos) << refused.error().message;
}

TEST(HostRegion, touch_keeps_bytes_that_others_write_meanwhile) {
  Result<HostRegion> region = HostRegion::create(256 << 20, kNormalPages);
  ASSERT_TRUE(region) << region.error().message;
  std::byte* data = region.value().data();
  std::jthread writer([&] {
    for (std::size_t i = 0; i < region.value().bytes(); i += 4096) data[i] = std::byte{0x5A};
  });
  ASSERT_TRUE(region.value().touch());
  writer.join();
  for (std::size_t i = 0; i < region.value().bytes(); i += 4096) ASSERT_EQ(data[i], std::byte{0x5A});
}

TEST(HostRegion, moves) {
  Result<HostRegion> made = HostRegion::create(1 << 20, kNormalPages);
  ASSERT_TRUE(made) << made.error().message;
  HostRegion first = std::move(made).value();
  std::byte* data = first.data();
  HostRegion second = std::move(first);
  EXPECT_EQ(second.data(), data);
  data[0] = std::byte{1};
}

TEST(HostRegion, uses_huge_pages_when_enough_are_free) {
  std::uint64_t free_pages = 0;
  std::ifstream("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") >> free_pages;
  Result<HostRegion> region = HostRegion::create(8 << 20, {});
  ASSERT_TRUE(region) << region.error().message;
  if (free_pages < 4) {
    EXPECT_NE(region.value().description().find("no huge pages free"), std::string::npos);
    GTEST_SKIP() << "fewer than 4 free 2 MiB pages: " << region.value().description();
  }
  EXPECT_EQ(region.value().description(), "2 MiB huge pages");
  Result<HostRegion> peer = HostRegion::map(Fd(dup(region.value().fd())), region.value().bytes());
  ASSERT_TRUE(peer) << peer.error().message;
  region.value().data()[5] = std::byte{9};
  EXPECT_EQ(peer.value().data()[5], std::byte{9});
  Result<HostRegion> more = HostRegion::create((free_pages + 8) << 21, {});
  ASSERT_TRUE(more) << more.error().message;
  EXPECT_NE(more.value().description().find("no huge pages free"), std::string::npos);
}

std::uint64_t mapped_as_huge(const std::byte* data) {
  std::ifstream maps("/proc/self/smaps");
  char start[32];
  std::snprintf(start, sizeof(start), "%lx-", reinterpret_cast<unsigned long>(data));
  bool here = false;
  for (std::string line; std::getline(maps, line);) {
    here = here || line.starts_with(start);
    if (here && line.starts_with("ShmemPmdMapped:")) return std::stoull(line.substr(15)) << 10;
  }
  return 0;
}

TEST(HostRegion, joins_normal_pages_to_huge_ones_where_the_kernel_can) {
  Result<HostRegion> region = HostRegion::create((64 << 20) + 4096, kNormalPages);
  ASSERT_TRUE(region) << region.error().message;
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(region.value().data()) % (2 << 20), 0U);
  ASSERT_TRUE(region.value().touch());
  for (std::size_t i = 0; i < region.value().bytes(); i += 512) ASSERT_EQ(region.value().data()[i], std::byte{0});
  Result<HostRegion> peer = HostRegion::map(Fd(dup(region.value().fd())), region.value().bytes());
  ASSERT_TRUE(peer) << peer.error().message;
  ASSERT_TRUE(peer.value().touch());
  const std::string& description = region.value().description();
  if (description.find("99 % joined to 2 MiB") == std::string::npos) GTEST_SKIP() << "not here: " << description;
  EXPECT_EQ(mapped_as_huge(region.value().data()), 64U << 20);
  EXPECT_EQ(mapped_as_huge(peer.value().data()), 64U << 20);
}

TEST(HostRegion, gives_back_the_room_around_it) {
  const auto lines = [] {
    std::ifstream maps("/proc/self/maps");
    return std::count(std::istreambuf_iterator<char>(maps), {}, '\n');
  };
  const auto before = lines();
  for (std::uint64_t pages = 1; pages <= 20; ++pages) ASSERT_TRUE(HostRegion::create(4096 * pages, kNormalPages));
  EXPECT_LT(lines(), before + 10);
  HostRegion held = HostRegion::create(8 << 20, kNormalPages).value();
  EXPECT_LT(lines(), before + 10);
}

TEST(AvailableMemory, is_a_plausible_number) { EXPECT_GT(available_memory(), 1U << 20); }

}  // namespace
}  // namespace flexkv::memory
