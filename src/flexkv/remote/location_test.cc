#include "flexkv/remote/location.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include "flexkv/remote/s3_list.h"

namespace flexkv::remote {
namespace {

TEST(Location, SaysWhereTheStoreIs) {
  const auto file = parse_location("file:///mnt/shared/kv/");
  ASSERT_TRUE(file.ok());
  EXPECT_EQ(file.value().kind, Location::Kind::kFile);
  EXPECT_EQ(file.value().path, "/mnt/shared/kv");
  const auto s3 = parse_location("s3://my-bucket/a/b/");
  ASSERT_TRUE(s3.ok());
  EXPECT_EQ(s3.value().kind, Location::Kind::kS3);
  EXPECT_EQ(s3.value().bucket, "my-bucket");
  EXPECT_EQ(s3.value().path, "a/b");
  EXPECT_EQ(parse_location("s3://my-bucket").value().path, "");
}

TEST(Location, OfAMooncakeStoreIsItsMastersAndAPrefix) {
  const auto mooncake = parse_location("mooncake://10.0.0.1:50051/a/b/").value();
  EXPECT_EQ(mooncake.kind, Location::Kind::kMooncake);
  EXPECT_EQ(mooncake.server, "10.0.0.1:50051");
  EXPECT_EQ(mooncake.path, "a/b");
  EXPECT_EQ(mooncake.default_endpoint(), "http://10.0.0.1:9003");
  EXPECT_EQ(parse_location("mooncake://[::1]:1").value().default_endpoint(), "http://[::1]:9003");
  for (const char* const url : {"mooncake://", "mooncake://host", "mooncake://host:0/x", "mooncake://host:65536",
                                "mooncake://:1", "mooncake://a b:1", "mooncake://host:1x", "mooncake://host:1/a b"}) {
    EXPECT_FALSE(parse_location(url).ok()) << url;
  }
}

TEST(Location, RefusesWhatCannotBeOneAndNamesIt) {
  for (const char* const url : {"", "/mnt/shared", "file://mnt/shared", "ftp://x", "s3://", "s3://UP/x", "s3://a b/x",
                                "s3://bucket/a b", "s3://bucket/a%20b"}) {
    const auto location = parse_location(url);
    ASSERT_FALSE(location.ok()) << url;
    EXPECT_NE(location.error().message.find(std::string("'") + url + "'"), std::string::npos);
  }
}

TEST(Location, TellsNoSecretThatSomebodyPutIntoAUrl) {
  const auto told = [](const char* url) { return parse_location(url).error().message; };
  EXPECT_NE(told("s3://user:secret@bucket/a").find("'s3://[hidden]@bucket/a'"), std::string::npos);
  EXPECT_NE(told("s3://bucket/a?key=secret").find("'s3://bucket/a?[hidden]'"), std::string::npos);
  for (const char* const url : {"s3://id:a/secret@bucket/a", "s3://id:a@secret@bucket", "http://secret@host",
                                "id:secret@bucket", "s3://bucket/a#secret", "s3://bucket/a?x=y@z&key=secret",
                                "s3://secret@bucket/a?key=secret", "file://secret@host/a"}) {
    ASSERT_FALSE(parse_location(url).ok()) << url;
    EXPECT_EQ(told(url).find("secret"), std::string::npos) << told(url);
  }
}

TEST(Location, RefusesEndpointsAndKeysThatCannotWork) {
  S3Options options;
  for (const char* const endpoint : {"localhost:9000", "ftp://host", "http://user:secret@host", "http://host/path"}) {
    options.endpoint = endpoint;
    const auto store = open_store("s3://bucket/p", options);
    ASSERT_FALSE(store.ok()) << endpoint;
    EXPECT_EQ(store.error().message.find("secret"), std::string::npos);
  }
  options.endpoint = "http://127.0.0.1:1";
  options.access_key = "only one";
  EXPECT_FALSE(open_store("s3://bucket/p", options).ok());
  options.secret_key = "both";
  EXPECT_TRUE(open_store("s3://bucket/p", options).ok());
}

TEST(Location, TakesCredentialsFromTheUsualPlaces) {
  ::setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000", 1);
  ::setenv("AWS_DEFAULT_REGION", "eu-central-1", 1);
  ::setenv("AWS_ACCESS_KEY_ID", "id", 1);
  ::setenv("AWS_SECRET_ACCESS_KEY", "secret", 1);
  ::setenv("AWS_SESSION_TOKEN", "token", 1);
  const S3Options options = S3Options::from_environment();
  EXPECT_EQ(options.endpoint, "http://127.0.0.1:9000");
  EXPECT_TRUE(options.path_style);
  EXPECT_EQ(options.region, "eu-central-1");
  EXPECT_EQ(options.access_key + options.secret_key + options.session_token, "idsecrettoken");
  ::setenv("AWS_REGION", "us-west-2", 1);
  ::setenv("AWS_ENDPOINT_URL_S3", "http://other", 1);
  EXPECT_EQ(S3Options::from_environment().region, "us-west-2");
  EXPECT_EQ(S3Options::from_environment().endpoint, "http://other");
}

TEST(S3List, ReadsPages) {
  const auto page = parse_s3_page(
      "<?xml version=\"1.0\"?><ListBucketResult xmlns=\"x\"><IsTruncated>true</IsTruncated>"
      "<Contents><Key>p/a</Key><Size>12</Size></Contents><Contents><Size>0</Size><Key>p/b</Key></Contents>"
      "</ListBucketResult>");
  ASSERT_TRUE(page.ok());
  EXPECT_TRUE(page.value().truncated);
  ASSERT_EQ(page.value().objects.size(), 2U);
  EXPECT_EQ(page.value().objects[0].path, "p/a");
  EXPECT_EQ(page.value().objects[0].bytes, 12U);
  EXPECT_EQ(page.value().objects[1].path, "p/b");
}

// A scan that believes half a listing forgets what the other half has.
TEST(S3List, RefusesHalfPages) {
  const std::string whole =
      "<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key><Size>1</Size></Contents>"
      "</ListBucketResult>";
  ASSERT_TRUE(parse_s3_page(whole).ok());
  for (std::size_t size = 0; size < whole.size(); ++size) EXPECT_FALSE(parse_s3_page(whole.substr(0, size)).ok());
  EXPECT_FALSE(parse_s3_page("<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>").ok());
  EXPECT_FALSE(parse_s3_page("<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key><Size>x</Size>"
                             "</Contents></ListBucketResult>")
                   .ok());
}

TEST(S3List, NamesErrors) {
  EXPECT_EQ(s3_error_code("<Error><Code>SlowDown</Code></Error>"), "SlowDown");
  EXPECT_EQ(s3_error_code("<html>busy</html>"), "");
  EXPECT_EQ(s3_error_code("<Code>not a\ncode</Code>"), "");
}

}  // namespace
}  // namespace flexkv::remote
