#include "flexkv/remote/catalog.h"

#include <gtest/gtest.h>

namespace flexkv::remote {
namespace {

key::BlockKey key_of(std::uint64_t block) { return {block, block * 7}; }
ObjectName name_of(std::uint8_t number) { return {{number}, 1}; }

Chain chain_of(std::uint64_t first, std::uint64_t count) {
  Chain chain;
  for (std::uint64_t i = first; i < first + count; ++i) chain.keys.push_back(key_of(i));
  return chain;
}

class CatalogTest : public ::testing::Test {
 protected:
  std::size_t leading(std::uint64_t first, std::uint64_t count) const {
    return catalog_.leading(chain_of(first, count).keys);
  }
  void end_scan() {
    while (!catalog_.sweep()) {
    }
  }

  Catalog::Room room_{100, 0};
  Catalog catalog_{room_};
};

TEST_F(CatalogTest, FindsLeadingBlocksAndPlaces) {
  catalog_.add(name_of(1), chain_of(0, 3));
  catalog_.add(name_of(2), chain_of(4, 3));
  EXPECT_EQ(leading(0, 10), 3U);
  EXPECT_EQ(leading(4, 10), 3U);
  const auto place = catalog_.find(key_of(5));
  ASSERT_TRUE(place);
  EXPECT_EQ(place->object, name_of(2));
  EXPECT_EQ(place->index, 1U);
}

TEST_F(CatalogTest, ABlockOfTwoObjectsIsFoundInTheOtherWhenOneIsGone) {
  catalog_.add(name_of(1), chain_of(0, 4));
  catalog_.add(name_of(2), chain_of(2, 4));
  EXPECT_EQ(catalog_.find(key_of(2))->object, name_of(1));
  catalog_.forget(name_of(1));
  EXPECT_EQ(leading(2, 10), 4U);
  EXPECT_EQ(catalog_.find(key_of(2))->object, name_of(2));
  catalog_.forget(name_of(2));
  EXPECT_EQ(catalog_.blocks(), 0U);
}

TEST_F(CatalogTest, AScanForgetsWhatItDidNotSee) {
  catalog_.add(name_of(1), chain_of(0, 4));
  catalog_.add(name_of(2), chain_of(4, 4));
  catalog_.begin_scan();
  EXPECT_FALSE(catalog_.see(name_of(1)));
  EXPECT_TRUE(catalog_.see(name_of(3)));
  catalog_.add(name_of(4), chain_of(20, 1));  // written meanwhile
  end_scan();
  EXPECT_EQ(leading(0, 4), 4U);
  EXPECT_EQ(leading(4, 4), 0U);
  EXPECT_EQ(leading(20, 1), 1U);
  for (std::uint8_t i = 10; i < 60; ++i) catalog_.add(name_of(i), chain_of(100 + i, 1));
  catalog_.begin_scan();
  end_scan();
  EXPECT_EQ(catalog_.objects(), 0U);
}

TEST_F(CatalogTest, AScanSweepsAllOfManyObjects) {
  room_.blocks_left = 5000;
  for (std::uint32_t i = 0; i < 2000; ++i) catalog_.add({{1}, i + 1}, chain_of(i, 2));
  catalog_.begin_scan();
  EXPECT_FALSE(catalog_.sweep());  // others have their turn
  end_scan();
  EXPECT_EQ(catalog_.objects() + catalog_.blocks(), 0U);
  EXPECT_EQ(room_.blocks_left, 5000U);
}

TEST_F(CatalogTest, CondemnedObjectsStayAwayUntilPardoned) {
  catalog_.add(name_of(1), chain_of(0, 4));
  catalog_.condemn(name_of(1));
  EXPECT_EQ(leading(0, 4), 0U);
  EXPECT_FALSE(catalog_.see(name_of(1)));
  catalog_.pardon(name_of(1));
  EXPECT_TRUE(catalog_.see(name_of(1)));
}

TEST_F(CatalogTest, TakesNoMoreThanThereIsRoomFor) {
  catalog_.add(name_of(1), chain_of(0, 98));
  catalog_.add(name_of(2), chain_of(200, 3));
  EXPECT_EQ(room_.left_out, 1U);
  EXPECT_EQ(leading(200, 3), 0U);
  catalog_.forget(name_of(1));
  catalog_.add(name_of(2), chain_of(200, 3));
  EXPECT_EQ(leading(200, 3), 3U);
  EXPECT_EQ(room_.blocks_left, 97U);
}

}  // namespace
}  // namespace flexkv::remote
