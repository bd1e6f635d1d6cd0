#include "flexkv/remote/store_probe.h"

#include <fcntl.h>
#include <sys/stat.h>

#include "flexkv/base/fd.h"
#include "flexkv/remote/file_store.h"
#include "flexkv/remote/test_tier.h"

namespace flexkv::remote {
namespace {

using testing::Folder;

constexpr Nanos kPatience = 60 * kSecond;

std::vector<ProbeStep> probe(const std::filesystem::path& directory, Nanos within = kPatience) {
  FileStore store(directory.string(), 1);
  return probe_store(store, within);
}

TEST(StoreProbe, ListsWritesAndReads) {
  const Folder folder;
  for (int round = 0; round < 2; ++round) {
    const auto steps = probe(folder.path());
    ASSERT_EQ(steps.size(), 3U);
    EXPECT_EQ(steps[0].what + steps[1].what + steps[2].what, "listwriteread");
    for (const ProbeStep& step : steps) {
      EXPECT_EQ(step.why, "");
      EXPECT_GT(step.took, 0);
    }
  }
  EXPECT_EQ(std::filesystem::file_size(folder.path() / kProbePath), 16U);
}

TEST(StoreProbe, SaysWhatFails) {
  const Folder folder;
  for (const ProbeStep& step : probe(folder.path() / "nowhere")) {
    EXPECT_NE(step.why.find("is it mounted?"), std::string::npos) << step.what << ": " << step.why;
  }
  std::filesystem::create_directories(folder.path() / kProbePath);  // not a file
  const auto steps = probe(folder.path());
  EXPECT_EQ(steps[0].why, "");
  EXPECT_NE(steps[1].why, "");
  EXPECT_NE(steps[2].why, "");
}

TEST(StoreProbe, EndsByItsDeadlineWhereAFileSystemHangs) {
  const Folder folder;
  const auto object = folder.path() / kProbePath;
  std::filesystem::create_directories(object.parent_path());
  ASSERT_EQ(::mkfifo(object.c_str(), 0600), 0);
  std::array<std::byte, 16> into{};
  FileStore store(folder.path().string(), 1);
  store.begin(100, GetOp{kProbePath, 0, {std::span(into)}});  // its only thread waits for somebody who writes
  const auto steps = probe_store(store, 20 * kMillisecond);
  ASSERT_EQ(steps.size(), 3U);
  for (const ProbeStep& step : steps) EXPECT_EQ(step.why, "no answer within 20 ms") << step.what;
  const Fd writer(::open(object.c_str(), O_RDWR | O_NONBLOCK));
  ASSERT_TRUE(writer.valid());
}

}  // namespace
}  // namespace flexkv::remote
