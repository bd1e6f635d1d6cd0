// Where the blocks of a cluster are kept, as users say it: file:///mnt/shared/prefix, s3://bucket/prefix or
// mooncake://host:port/prefix.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/remote/store.h"

namespace flexkv::remote {

// How to reach an S3-compatible store. Secrets appear in no log line and no error.
struct S3Options {
  std::string endpoint;  // http(s)://HOST[:PORT]; empty: Amazon's of the region
  std::string region = "us-east-1";
  bool path_style = false;  // ENDPOINT/BUCKET/..., as most stores but Amazon's want it, instead of BUCKET.HOST/...
  std::string access_key;   // empty: requests are not signed
  std::string secret_key;
  std::string session_token;  // empty: none
  std::string ca_file;        // that says whom to trust; empty: the system's

  // From AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL (then path_style, too), AWS_REGION or AWS_DEFAULT_REGION,
  // AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_CA_BUNDLE. Not thread-safe against setenv().
  static S3Options from_environment();
};

// How to reach a Mooncake Store.
struct MooncakeOptions {
  std::vector<std::string> helper;  // the command of the process that runs its client (docs/decisions/0036)
  std::string endpoint;  // http://HOST:PORT, where the master lists what there is; empty: port 9003 of its host
};

struct Location {
  enum class Kind : std::uint8_t { kFile, kS3, kMooncake };
  Kind kind = Kind::kFile;
  std::string bucket;  // of kS3
  std::string path;    // kFile: absolute; otherwise: prefix, empty or without '/' at its ends
  std::string server;  // of kMooncake: HOST:PORT of the master

  // Of kMooncake: where the master lists what there is, unless told otherwise.
  std::string default_endpoint() const;
};

// The error says what is wrong with the URL and how it should look.
Result<Location> parse_location(const std::string& url);

// Asks nothing of the store yet. Fails for a wrong URL or endpoint, for s3:// when libcurl is not there, and for
// mooncake:// without a command.
Result<std::unique_ptr<Store>> open_store(const std::string& url, const S3Options& s3,
                                          const MooncakeOptions& mooncake = {});

}  // namespace flexkv::remote
