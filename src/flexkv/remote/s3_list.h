// What an S3 store answers to a listing (ListObjectsV2), and in errors. Pure functions; they trust nothing.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/remote/store.h"

namespace flexkv::remote {

struct S3Page {
  std::vector<ListedObject> objects;  // paths as they stand there, with the prefix
  bool truncated = false;             // more come behind the last one
};
Result<S3Page> parse_s3_page(std::string_view xml);

// The error's code, as "SlowDown"; empty: there is none.
std::string s3_error_code(std::string_view xml);

}  // namespace flexkv::remote
