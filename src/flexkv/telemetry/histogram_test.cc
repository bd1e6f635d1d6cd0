#include "flexkv/telemetry/histogram.h"

#include <gtest/gtest.h>

namespace flexkv::telemetry {
namespace {

TEST(Histogram, QuantilesAreWithinOneBucket) {
  Histogram histogram;
  for (int us = 1; us <= 1000; ++us) histogram.record(us * kMicrosecond);
  EXPECT_EQ(histogram.count(), 1000u);
  EXPECT_NEAR(histogram.quantile_us(0.5), 500, 500 * 0.2);
  EXPECT_NEAR(histogram.quantile_us(0.99), 990, 990 * 0.2);
  EXPECT_EQ(histogram.quantile_us(1.0), 1000);
  EXPECT_NEAR(histogram.sum_us(), 500500, 1);
}

TEST(Histogram, ExtremesFallIntoTheOuterBuckets) {
  Histogram histogram;
  EXPECT_EQ(histogram.quantile_us(0.5), 0);
  histogram.record(-5);
  histogram.record(0);
  histogram.record(1'000'000 * kSecond);
  EXPECT_EQ(histogram.bucket(0), 2u);
  EXPECT_EQ(histogram.bucket(Histogram::kBucketCount - 1), 1u);
}

}  // namespace
}  // namespace flexkv::telemetry
