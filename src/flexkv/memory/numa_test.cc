#include "flexkv/memory/numa.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

namespace flexkv::memory {
namespace {

// What the kernel would say of a machine.
class NumaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "flexkv-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    root_ = name;
    CPU_ZERO(&allowed_);
    ASSERT_EQ(sched_getaffinity(0, sizeof allowed_, &allowed_), 0);
    while (!CPU_ISSET(cpu_, &allowed_)) ++cpu_;
  }
  void TearDown() override {
    std::filesystem::remove_all(root_);
    ASSERT_EQ(sched_setaffinity(0, sizeof allowed_, &allowed_), 0);
  }

  void say(const std::string& file, const std::string& line) const {
    std::filesystem::create_directories((root_ / file).parent_path());
    std::ofstream(root_ / file) << line << '\n';
  }
  void node(unsigned number, const std::string& cpus) const {
    say("devices/system/node/node" + std::to_string(number) + "/cpulist", cpus);
  }
  void pci(const std::string& name, const std::string& vendor, const std::string& kind, const std::string& node) const {
    const std::string device = "bus/pci/devices/" + name + "/";
    say(device + "vendor", vendor);
    say(device + "class", kind);
    say(device + "numa_node", node);
  }
  // Two sockets whose CPUs are all one that this process may run on.
  void two_sockets() const {
    say("devices/system/node/has_memory", "0-1");
    node(0, std::to_string(cpu_));
    node(1, std::to_string(cpu_));
  }
  std::vector<unsigned> numbers() const {
    std::vector<unsigned> numbers;
    for (const NumaNode& node : place_near_gpus(root_.string()).nodes) numbers.push_back(node.number);
    return numbers;
  }
  std::string text() const { return place_near_gpus(root_.string()).text; }

  std::filesystem::path root_;
  cpu_set_t allowed_{};
  unsigned cpu_ = 0;
};

using Numbers = std::vector<unsigned>;

TEST_F(NumaTest, where_there_is_one_node_there_is_nothing_to_choose) {
  EXPECT_EQ(text(), "");
  say("devices/system/node/has_memory", "0");
  node(0, std::to_string(cpu_));
  pci("0000:17:00.0", "0x10de", "0x030200", "0");
  EXPECT_EQ(numbers(), Numbers{});
  EXPECT_EQ(text(), "");
}

TEST_F(NumaTest, takes_the_node_of_the_gpus) {
  two_sockets();
  pci("0000:00:1f.0", "0x8086", "0x030000", "0");  // another maker's display
  pci("0000:05:00.0", "0x10de", "0x068000", "0");  // a bridge of the same maker
  pci("0000:97:00.0", "0x10de", "0x030200", "1");
  pci("0000:98:00.0", "0x10de", "0x030200", "1");
  EXPECT_EQ(numbers(), Numbers{1});
  EXPECT_EQ(text(), "on NUMA node 1, where the GPUs are");
}

TEST_F(NumaTest, takes_turns_where_gpus_are_on_several) {
  two_sockets();
  say("devices/system/node/has_memory", "0-1,3");
  pci("0000:17:00.0", "0x10de", "0x030200", "0");
  pci("0000:97:00.0", "0x10de", "0x030000", "1");
  pci("0000:98:00.0", "0x10de", "0x030200", "-1");
  EXPECT_EQ(numbers(), (Numbers{0, 1}));
  EXPECT_EQ(text(), "in turns on NUMA nodes 0 and 1, where the GPUs are");
}

TEST_F(NumaTest, leaves_it_where_gpus_do_not_say) {
  two_sockets();
  pci("0000:17:00.0", "0x10de", "0x030200", "-1");
  EXPECT_EQ(numbers(), Numbers{});
  EXPECT_EQ(text(), "on any NUMA node (no GPU here says which is its own)");
}

TEST_F(NumaTest, leaves_out_nodes_without_memory_or_cpus_and_cpus_that_are_not_ours) {
  say("devices/system/node/has_memory", "0-2");
  node(0, "1000-1023");
  node(1, "");  // as the memory of a GPU that is a node itself
  node(2, "1000-1023," + std::to_string(cpu_));
  pci("0000:17:00.0", "0x10de", "0x030200", "0");
  pci("0000:18:00.0", "0x10de", "0x030200", "1");
  EXPECT_EQ(numbers(), Numbers{});
  EXPECT_EQ(text(), "on any NUMA node (this process may not run where the GPUs are)");
  pci("0000:97:00.0", "0x10de", "0x030200", "2");
  pci("0000:98:00.0", "0x10de", "0x030200", "7");
  EXPECT_EQ(numbers(), Numbers{2});
}

TEST_F(NumaTest, files_that_say_nonsense_do_no_harm) {
  say("devices/system/node/has_memory", "0-,x,4-2,99999999999,0-4000000000");
  pci("0000:17:00.0", "", "", "");
  EXPECT_EQ(numbers(), Numbers{});
}

TEST_F(NumaTest, a_thread_is_on_its_node_in_its_turn_and_free_again_afterwards) {
  NumaNode node{1, {}};
  CPU_ZERO(&node.cpus);
  CPU_SET(cpu_, &node.cpus);
  cpu_set_t now;
  {
    const NearNode near({&node, 1}, 5);
    ASSERT_EQ(sched_getaffinity(0, sizeof now, &now), 0);
    EXPECT_TRUE(CPU_EQUAL(&now, &node.cpus));
  }
  ASSERT_EQ(sched_getaffinity(0, sizeof now, &now), 0);
  EXPECT_TRUE(CPU_EQUAL(&now, &allowed_));
  CPU_ZERO(&node.cpus);  // nowhere to run
  const NearNode nowhere({&node, 1}, 0);
  ASSERT_EQ(sched_getaffinity(0, sizeof now, &now), 0);
  EXPECT_TRUE(CPU_EQUAL(&now, &allowed_));
}

}  // namespace
}  // namespace flexkv::memory
