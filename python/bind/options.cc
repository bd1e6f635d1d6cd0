#include "options.h"

#include <nanobind/stl/vector.h>

namespace flexkv::bind {

server::RemoteOptions remote_options(const nanobind::dict& options) {
  server::RemoteOptions remote;
  remote.url = option<std::string>(options, "remote_url", "");
  remote.cluster = option<std::string>(options, "remote_cluster", remote.cluster);
  remote.secret_file = option<std::string>(options, "remote_secret_file", "");
  remote.s3 = remote::S3Options::from_environment();
  remote.mooncake.helper = option<std::vector<std::string>>(options, "remote_mooncake_helper", {});
  if (auto endpoint = option<std::string>(options, "remote_endpoint", ""); !endpoint.empty()) {
    remote.mooncake.endpoint = endpoint;
    remote.s3.endpoint = std::move(endpoint);
    remote.s3.path_style = true;
  }
  if (auto region = option<std::string>(options, "remote_region", ""); !region.empty()) {
    remote.s3.region = std::move(region);
  }
  if (auto access_key = option<std::string>(options, "remote_access_key", ""); !access_key.empty()) {
    remote.s3.access_key = std::move(access_key);
    remote.s3.secret_key = option<std::string>(options, "remote_secret_key", "");
    remote.s3.session_token.clear();
  }
  return remote;
}

}  // namespace flexkv::bind
