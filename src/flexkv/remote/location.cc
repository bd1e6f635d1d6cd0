#include "flexkv/remote/location.h"

#include <charconv>
#include <cstdlib>
#include <string_view>
#include <utility>

#include "flexkv/remote/file_store.h"
#include "flexkv/remote/mooncake_store.h"
#include "flexkv/remote/s3_store.h"

namespace flexkv::remote {
namespace {

constexpr std::string_view kFileScheme = "file://";
constexpr std::string_view kS3Scheme = "s3://";
constexpr std::string_view kMooncakeScheme = "mooncake://";
constexpr unsigned kFileThreads = 8;
// What needs no escape in a URL, so that nobody can differ about how it is signed.
constexpr std::string_view kPrefixCharacters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/";
constexpr std::string_view kHostCharacters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._:[]";
constexpr std::size_t kS3PrefixMax = 512;
constexpr std::size_t kMooncakePrefixMax = 128;  // with what follows it, a name fits into a frame
constexpr std::string_view kBucketCharacters = "abcdefghijklmnopqrstuvwxyz0123456789-.";

// Without what may be a secret that somebody put where none belongs: before an '@', and behind a '?' or '#'.
std::string redacted(std::string_view url) {
  constexpr std::string_view kHidden = "[hidden]";
  constexpr std::string_view kSchemeEnd = "://";
  std::string shown;
  if (const auto scheme = url.find(kSchemeEnd); scheme != url.npos) {
    shown = url.substr(0, scheme + kSchemeEnd.size());
    url.remove_prefix(shown.size());
  }
  const auto user_end = url.rfind('@');
  const auto query = url.find_first_of("?#");
  if (user_end == url.npos && query == url.npos) return shown.append(url);
  if (user_end == url.npos) return shown.append(url.substr(0, query + 1)).append(kHidden);
  shown += kHidden;
  // Either of the two may be part of a secret.
  return query < user_end ? shown : shown.append(url.substr(user_end, query - user_end));
}

Error wrong(const std::string& url, const std::string& why) {
  return {ErrorCode::kInvalidArgument, "remote store '" + redacted(url) + "': " + why};
}

std::string environment(std::initializer_list<const char*> names) {
  for (const char* const name : names) {
    const char* const value = std::getenv(name);
    if (value != nullptr && *value != '\0') return value;
  }
  return {};
}

std::string without_slashes_behind(std::string_view text) {
  while (text.size() > 1 && text.ends_with('/')) text.remove_suffix(1);
  return std::string(text);
}

// Without '/' at its ends.
Result<std::string> prefix_of(const std::string& url, std::string_view prefix, std::size_t max) {
  while (prefix.starts_with('/')) prefix.remove_prefix(1);
  while (prefix.ends_with('/')) prefix.remove_suffix(1);
  if (prefix.find_first_not_of(kPrefixCharacters) != prefix.npos || prefix.size() > max) {
    return wrong(url,
                 "a prefix has at most " + std::to_string(max) + " of letters, digits, '-', '.', '_', '~' and '/'");
  }
  return std::string(prefix);
}

bool is_server(std::string_view server) {
  const auto colon = server.rfind(':');
  if (colon == server.npos || colon == 0 || server.size() > 255) return false;
  std::uint16_t port = 0;
  const char* const end = server.data() + server.size();
  const auto [parsed, error] = std::from_chars(server.data() + colon + 1, end, port);
  return error == std::errc() && parsed == end && port > 0 &&
         server.substr(0, colon).find_first_not_of(kHostCharacters) == server.npos;
}

Result<Location> parse_mooncake(const std::string& url) {
  const std::string_view rest = std::string_view(url).substr(kMooncakeScheme.size());
  const std::string_view server = rest.substr(0, rest.find('/'));
  if (!is_server(server)) {
    return wrong(url, "write mooncake://HOST:PORT or mooncake://HOST:PORT/prefix, of Mooncake's master");
  }
  auto prefix = prefix_of(url, rest.substr(server.size()), kMooncakePrefixMax);
  if (!prefix.ok()) return prefix.error();
  return Location{Location::Kind::kMooncake, {}, std::move(prefix).value(), std::string(server)};
}

}  // namespace

S3Options S3Options::from_environment() {
  S3Options options;
  options.endpoint = environment({"AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"});
  options.path_style = !options.endpoint.empty();
  if (std::string region = environment({"AWS_REGION", "AWS_DEFAULT_REGION"}); !region.empty()) {
    options.region = std::move(region);
  }
  options.access_key = environment({"AWS_ACCESS_KEY_ID"});
  options.secret_key = environment({"AWS_SECRET_ACCESS_KEY"});
  options.session_token = environment({"AWS_SESSION_TOKEN"});
  options.ca_file = environment({"AWS_CA_BUNDLE"});
  return options;
}

Result<Location> parse_location(const std::string& url) {
  const std::string_view text(url);
  if (text.starts_with(kFileScheme)) {
    const std::string_view path = text.substr(kFileScheme.size());
    if (!path.starts_with('/')) return wrong(url, "the path is not absolute; write file:///mnt/shared/prefix");
    return Location{Location::Kind::kFile, {}, without_slashes_behind(path), {}};
  }
  if (text.starts_with(kMooncakeScheme)) return parse_mooncake(url);
  if (!text.starts_with(kS3Scheme)) {
    return wrong(url, "write file:///mnt/shared/prefix, s3://bucket/prefix or mooncake://host:port/prefix");
  }
  const std::string_view rest = text.substr(kS3Scheme.size());
  const std::string_view bucket = rest.substr(0, rest.find('/'));
  if (bucket.size() < 3 || bucket.size() > 63 || bucket.find_first_not_of(kBucketCharacters) != bucket.npos) {
    return wrong(url, "a bucket's name has 3 to 63 of a-z, 0-9, '-' and '.'; write s3://bucket/prefix");
  }
  auto prefix = prefix_of(url, rest.substr(bucket.size()), kS3PrefixMax);
  if (!prefix.ok()) return prefix.error();
  return Location{Location::Kind::kS3, std::string(bucket), std::move(prefix).value(), {}};
}

std::string Location::default_endpoint() const { return "http://" + server.substr(0, server.rfind(':')) + ":9003"; }

Result<std::unique_ptr<Store>> open_store(const std::string& url, const S3Options& s3,
                                          const MooncakeOptions& mooncake) {
  auto location = parse_location(url);
  if (!location.ok()) return location.error();
  if (location.value().kind == Location::Kind::kS3) return S3Store::open(location.value(), s3);
  if (location.value().kind == Location::Kind::kMooncake) return MooncakeStore::open(location.value(), mooncake);
  return std::unique_ptr<Store>(std::make_unique<FileStore>(location.value().path, kFileThreads));
}

}  // namespace flexkv::remote
