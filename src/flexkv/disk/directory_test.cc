#include "flexkv/disk/directory.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "flexkv/disk/check.h"

namespace flexkv::disk {
namespace {

namespace fs = std::filesystem;

const std::string kSpace(64, 'a');

class DirectoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "flexkv-dir-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    path_ = name;
  }
  void TearDown() override { fs::remove_all(path_); }

  void write(const std::string& name, const std::string& text) const { std::ofstream(path_ + "/" + name) << text; }
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(path_)) found.push_back(entry.path().filename());
    std::ranges::sort(found);
    return found;
  }
  std::string refusal_of_check() const {
    const auto report = check(path_, 0, [](auto, auto) {});
    return report ? "" : report.error().message;
  }
  // As a node leaves it that has ended.
  void make_cache() const { ASSERT_TRUE(Home::open({path_}).ok()); }

  std::string path_;
};

TEST_F(DirectoryTest, WhatIsNoCacheIsRefusedAndStaysAsItIs) {
  write("passwd", "root");
  write("node.secret", "too short for a secret");
  write("node.lock", "4711");
  write(kSpace + ".records", "no header");
  write(kSpace + ".blocks", std::string(8192, 'x'));
  fs::create_directory(path_ + "/folder");
  ::chmod(path_.c_str(), 01777);  // as /tmp
  const auto before = names();
  for (const std::string& refusal :
       {refusal_of_check(), clear(path_).error().message, inspect(path_).error().message}) {
    EXPECT_TRUE(refusal.starts_with("not an SSD cache directory (")) << refusal;
    EXPECT_EQ(refusal.find("chmod"), std::string::npos) << refusal;
  }
  EXPECT_EQ(names(), before);
  std::string pid;
  std::ifstream(path_ + "/node.lock") >> pid;
  EXPECT_EQ(pid, "4711");
}

TEST_F(DirectoryTest, ASecretThatIsGivenReplacesTheStoredOne) {
  const Secret own = Home::open({path_}).value().secret;
  Secret given{};
  given.fill(9);
  EXPECT_EQ(Home::open({path_}, false, given).value().secret, given);
  EXPECT_EQ(Home::open({path_}).value().secret, given) << "stored, for a start without it";
  EXPECT_NE(own, given);
}

TEST_F(DirectoryTest, ASecretOrAHeaderMakesACache) {
  make_cache();
  EXPECT_TRUE(inspect(path_).ok());
  fs::remove(path_ + "/node.secret");
  EXPECT_FALSE(inspect(path_).ok());
  Header header;
  header.epoch = 1;
  header.slot_bytes = 4096;
  const HeaderPage page = encode_header(header);
  write(kSpace + ".records", {reinterpret_cast<const char*>(page.data()), page.size()});
  EXPECT_TRUE(inspect(path_).ok());
}

TEST_F(DirectoryTest, ForeignFilesAreCountedAndLeftAlone) {
  make_cache();
  write(kSpace + ".blocks", std::string(8192, 'x'));
  write("notes.txt", "mine");
  write("a.blocks", "not a space's name");
  const auto contents = inspect(path_);
  ASSERT_TRUE(contents.ok()) << contents.error().message;
  EXPECT_EQ(contents.value().bytes, 8192U);
  EXPECT_EQ(contents.value().foreign_count, 2U);
  EXPECT_EQ(contents.value().foreign.size(), 2U);
  EXPECT_EQ(clear(path_).value(), 8192U);
  EXPECT_EQ(names(), (std::vector<std::string>{"a.blocks", "node.lock", "node.secret", "notes.txt"}));
}

TEST_F(DirectoryTest, WhileANodeUsesItTheAdviceIsToStopThatNode) {
  auto home = Home::open({path_});
  ASSERT_TRUE(home.ok());
  for (const std::string& refusal : {refusal_of_check(), clear(path_).error().message}) {
    EXPECT_NE(refusal.find("is in use by the process " + std::to_string(::getpid())), std::string::npos) << refusal;
    EXPECT_NE(refusal.find("stop that node first"), std::string::npos) << refusal;
  }
  const auto second = Home::open({path_});
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.error().message.find("a directory of its own"), std::string::npos) << second.error().message;
}

TEST_F(DirectoryTest, OnlyTheModeOfACacheIsToBeChanged) {
  ::chmod(path_.c_str(), 01777);
  auto home = Home::open({path_});
  ASSERT_TRUE(home.ok());
  EXPECT_NE(home.value().places[0].why_not.find("such as " + path_ + "/flexkv"), std::string::npos)
      << home.value().places[0].why_not;
  EXPECT_EQ(home.value().places[0].why_not.find("chmod"), std::string::npos);
  ::chmod(path_.c_str(), 0700);
  make_cache();
  ::chmod(path_.c_str(), 0770);
  home = Home::open({path_});
  EXPECT_NE(home.value().places[0].why_not.find("run: chmod go-w " + path_), std::string::npos);
}

}  // namespace
}  // namespace flexkv::disk
