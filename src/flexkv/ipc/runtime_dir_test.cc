#include "flexkv/ipc/runtime_dir.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>

#include "flexkv/ipc/listener.h"
#include "flexkv/ipc/test_support.h"

namespace flexkv::ipc {
namespace {

using testing::TempDir;

TEST(RuntimeDir, CreatesThePrivateDirectory) {
  const TempDir temp;
  const auto dir = runtime_dir(temp.path() + "/run//");
  ASSERT_TRUE(dir.ok()) << dir.error().message;
  EXPECT_EQ(dir.value(), temp.path() + "/run");
  struct stat info {};
  ASSERT_EQ(::stat(dir.value().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0700U);
  EXPECT_TRUE(runtime_dir(dir.value()).ok());
}

TEST(RuntimeDir, PrefersXdgAndPassesOverAnUnusableOne) {
  const TempDir temp;
  ::setenv("XDG_RUNTIME_DIR", temp.path().c_str(), 1);
  EXPECT_EQ(runtime_dir("").value(), temp.path() + "/flexkv");
  ::setenv("XDG_RUNTIME_DIR", "/nonexistent", 1);
  const auto fallback = runtime_dir("");
  ASSERT_TRUE(fallback.ok()) << fallback.error().message;
  EXPECT_TRUE(fallback.value() == "/run/flexkv" || fallback.value().starts_with("/tmp/flexkv-"));
  ::unsetenv("XDG_RUNTIME_DIR");
}

TEST(RuntimeDir, RefusesWhatIsNotPrivate) {
  const TempDir temp;
  const std::string dir = temp.path() + "/run";
  ASSERT_TRUE(runtime_dir(dir).ok());
  for (const mode_t mode : {0750U, 0701U, 0777U}) {
    ASSERT_EQ(::chmod(dir.c_str(), mode), 0);
    EXPECT_FALSE(runtime_dir(dir).ok()) << mode;
  }
  ASSERT_EQ(::chmod(dir.c_str(), 0700), 0);
  const std::string link = temp.path() + "/link";
  ASSERT_EQ(::symlink(dir.c_str(), link.c_str()), 0);
  EXPECT_FALSE(runtime_dir(link).ok());
  EXPECT_FALSE(runtime_dir(link + "/").ok());
  std::ofstream(temp.path() + "/file") << "x";
  EXPECT_FALSE(runtime_dir(temp.path() + "/file").ok());
  EXPECT_FALSE(runtime_dir("relative").ok());
  const auto below = runtime_dir(temp.path() + "/no/parent");
  ASSERT_FALSE(below.ok());
  EXPECT_NE(below.error().message.find("set FLEXKV_RUNTIME_DIR"), std::string::npos) << below.error().message;
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown(dir.c_str(), 65534, 65534), 0);
    EXPECT_FALSE(runtime_dir(dir).ok());
  }
}

TEST(RuntimeDir, NamesOfSockets) {
  EXPECT_TRUE(valid_socket_name("node-0.a_B"));
  for (const char* name : {"", ".hidden", "..", "a/b", "a b"}) EXPECT_FALSE(valid_socket_name(name));
  EXPECT_FALSE(valid_socket_name(std::string(65, 'a')));
}

TEST(Sweep, KeepsTheLivingAndTheForeign) {
  const TempDir temp;
  const auto alive = Listener::listen(temp.path(), "alive");
  ASSERT_TRUE(alive.ok());
  std::ofstream(temp.path() + "/file.sock") << "not a socket";
  std::ofstream(temp.path() + "/file.lock") << "not an owner";
  EXPECT_EQ(sweep_stale(temp.path()).value(), 0U);
  EXPECT_TRUE(std::filesystem::exists(temp.path() + "/alive.sock"));
  EXPECT_TRUE(std::filesystem::exists(temp.path() + "/file.sock"));
  EXPECT_TRUE(std::filesystem::exists(temp.path() + "/file.lock"));
  EXPECT_FALSE(sweep_stale(temp.path() + "/absent").ok());
}

}  // namespace
}  // namespace flexkv::ipc
