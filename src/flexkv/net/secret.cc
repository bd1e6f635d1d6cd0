#include "flexkv/net/secret.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <memory>

#include "flexkv/base/fd.h"

namespace flexkv::net {
namespace {

constexpr std::string_view kAdvice = "; `openssl rand -hex 32` makes a good one";

}  // namespace

Result<Secret> Secret::from_file(const std::string& path) {
  const Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK));
  if (!file.valid()) {
    const int saved = errno;
    Error error = errno_error("read the cluster's secret from " + path, saved);
    if (saved == ENOENT) error.code = ErrorCode::kNotFound;
    return error;
  }
  struct stat about {};
  if (::fstat(file.get(), &about) != 0) return errno_error("look at " + path, errno);
  if (!S_ISREG(about.st_mode)) return Error{ErrorCode::kInvalidArgument, path + " is not a file"};
  if ((about.st_mode & (S_IRWXG | S_IRWXO)) != 0) {
    return Error{ErrorCode::kInvalidArgument,
                 "others may read or change " + path + ", which holds the cluster's secret: chmod 600 it"};
  }
  std::string text(kMaxBytes + 1, '\0');
  std::size_t size = 0;
  while (size < text.size()) {
    const ssize_t got = ::read(file.get(), text.data() + size, text.size() - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno_error("read the cluster's secret from " + path, errno);
    if (got == 0) break;
    size += static_cast<std::size_t>(got);
  }
  text.resize(size);
  Result<Secret> secret = from_text(std::move(text));
  if (!secret.ok()) return Error{secret.error().code, path + ": " + secret.error().message};
  return secret;
}

Result<Secret> Secret::from_text(std::string text) {
  text.erase(text.find_last_not_of(" \t\r\n") + 1);
  if (text.size() < kMinBytes) {
    return Error{ErrorCode::kInvalidArgument, "the cluster's secret has " + std::to_string(text.size()) +
                                                  " characters, and needs " + std::to_string(kMinBytes) +
                                                  std::string(kAdvice)};
  }
  if (text.size() > kMaxBytes) {
    return Error{ErrorCode::kInvalidArgument, "the cluster's secret has more than " + std::to_string(kMaxBytes) +
                                                  " characters" + std::string(kAdvice)};
  }
  return Secret(std::move(text));
}

Secret::Key Secret::derive(std::string_view purpose) const {
  const std::unique_ptr<EVP_PKEY_CTX, void (*)(EVP_PKEY_CTX*)> context(EVP_PKEY_CTX_new_id(EVP_PKEY_HKDF, nullptr),
                                                                       EVP_PKEY_CTX_free);
  const auto* secret = reinterpret_cast<const unsigned char*>(text_.data());
  const auto* info = reinterpret_cast<const unsigned char*>(purpose.data());
  Key key{};
  std::size_t size = key.size();
  // No salt: the secret is nobody else's, and what the key is for is in the purpose.
  FLEXKV_ASSERT(context != nullptr && EVP_PKEY_derive_init(context.get()) == 1 &&
                EVP_PKEY_CTX_set_hkdf_md(context.get(), EVP_sha256()) == 1 &&
                EVP_PKEY_CTX_set1_hkdf_key(context.get(), secret, static_cast<int>(text_.size())) == 1 &&
                EVP_PKEY_CTX_add1_hkdf_info(context.get(), info, static_cast<int>(purpose.size())) == 1 &&
                EVP_PKEY_derive(context.get(), key.data(), &size) == 1 && size == key.size());
  return key;
}

}  // namespace flexkv::net
