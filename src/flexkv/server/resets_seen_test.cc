#include "flexkv/server/resets_seen.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <optional>

namespace flexkv::server {
namespace {

namespace fs = std::filesystem;

class ResetsSeenTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "flexkv-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    path_ = name;
    directory_.emplace(disk::Directory::open(path_.string()).value());
  }
  void TearDown() override { fs::remove_all(path_); }

  fs::path path_;
  std::optional<disk::Directory> directory_;
  const ResetsSeen seen_{hash_of_cluster("one"), {7, 99}, hash_of_marks({remote::Mark{1}, remote::Mark{2}})};
};

TEST_F(ResetsSeenTest, ComeBackForTheirCluster) {
  EXPECT_EQ(read_resets_seen(*directory_), ResetsSeen()) << "there is no record";
  ASSERT_TRUE(write_resets_seen(*directory_, seen_));
  EXPECT_EQ(read_resets_seen(*directory_), seen_);
  EXPECT_EQ(seen_.epoch_of("one"), (cluster::Epoch{7, 99}));
  EXPECT_EQ(seen_.epoch_of("other"), cluster::Epoch());
  EXPECT_EQ(ResetsSeen().epoch_of("one"), cluster::Epoch());
  EXPECT_NE(seen_.marks, hash_of_marks({remote::Mark{1}}));
}

TEST_F(ResetsSeenTest, OfARecordThatIsTornOrDamagedThereAreNone) {
  ASSERT_TRUE(write_resets_seen(*directory_, seen_));
  const ResetsRecord whole = encode(seen_);
  for (std::size_t at = 0; at < whole.size(); ++at) {
    auto damaged = whole;
    damaged[at] ^= std::byte{0x10};
    EXPECT_FALSE(decode_resets_seen(damaged).ok()) << "byte " << at;
    EXPECT_FALSE(decode_resets_seen(std::span(whole).first(at)).ok()) << at << " bytes";
  }
  fs::resize_file(path_ / "node.resets", whole.size() / 2);
  EXPECT_EQ(read_resets_seen(*directory_), ResetsSeen());
}

}  // namespace
}  // namespace flexkv::server
