#include "flexkv/net/tls.h"

#include <openssl/err.h>
#include <openssl/ssl.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

namespace flexkv::net {
namespace {

// TLS_AES_128_GCM_SHA256: a pre-shared key belongs to one hash.
constexpr std::array<unsigned char, 2> kCipherId{0x13, 0x01};
constexpr const char* kCipherName = "TLS_AES_128_GCM_SHA256";

constexpr std::size_t kReadBytes = 128U << 10;  // of each connection

std::string openssl_error() {
  std::array<char, 256> text{};
  const unsigned long code = ERR_get_error();
  ERR_clear_error();
  if (code == 0) return "unknown error";
  ERR_error_string_n(code, text.data(), text.size());
  return text.data();
}

int identity_slot() {
  static const int slot = SSL_CTX_get_ex_new_index(0, nullptr, nullptr, nullptr, nullptr);
  return slot;
}

}  // namespace

struct TlsContext::Identity {
  std::string name;
  Secret::Key key{};

  static const Identity& of(SSL* ssl) {
    return *static_cast<const Identity*>(SSL_CTX_get_ex_data(SSL_get_SSL_CTX(ssl), identity_slot()));
  }

  // A new session for the key, which the caller owns; null when OpenSSL has no memory.
  SSL_SESSION* session(SSL* ssl) const {
    const SSL_CIPHER* cipher = SSL_CIPHER_find(ssl, kCipherId.data());
    SSL_SESSION* session = SSL_SESSION_new();
    if (session != nullptr && cipher != nullptr && SSL_SESSION_set1_master_key(session, key.data(), key.size()) == 1 &&
        SSL_SESSION_set_cipher(session, cipher) == 1 &&
        SSL_SESSION_set_protocol_version(session, TLS1_3_VERSION) == 1) {
      return session;
    }
    SSL_SESSION_free(session);
    return nullptr;
  }
};

namespace {

int offer_key(SSL* ssl, const EVP_MD* md, const unsigned char** name, std::size_t* size, SSL_SESSION** session) {
  const auto& identity = TlsContext::Identity::of(ssl);
  *session = md == nullptr || md == EVP_sha256() || EVP_MD_is_a(md, "SHA256") ? identity.session(ssl) : nullptr;
  if (*session == nullptr) return 0;
  *name = reinterpret_cast<const unsigned char*>(identity.name.data());
  *size = identity.name.size();
  return 1;
}

int find_key(SSL* ssl, const unsigned char* name, std::size_t size, SSL_SESSION** session) {
  const auto& identity = TlsContext::Identity::of(ssl);
  const bool known = size == identity.name.size() && std::memcmp(name, identity.name.data(), size) == 0;
  *session = known ? identity.session(ssl) : nullptr;
  return 1;  // without a session the handshake goes on, and finds no certificate
}

}  // namespace

TlsContext::TlsContext(std::shared_ptr<Identity> identity, std::shared_ptr<SSL_CTX> context)
    : identity_(std::move(identity)), context_(std::move(context)) {}

Result<TlsContext> TlsContext::create(const Secret& secret, std::string_view cluster) {
  auto identity = std::make_shared<Identity>();
  identity->name = "flexkv peer 1 " + std::string(cluster);
  identity->key = secret.derive(identity->name);
  const std::shared_ptr<SSL_CTX> context(SSL_CTX_new(TLS_method()), SSL_CTX_free);
  const bool made = context != nullptr && SSL_CTX_set_min_proto_version(context.get(), TLS1_3_VERSION) == 1 &&
                    SSL_CTX_set_ciphersuites(context.get(), kCipherName) == 1 &&
                    SSL_CTX_set_num_tickets(context.get(), 0) == 1 &&
                    SSL_CTX_set_ex_data(context.get(), identity_slot(), identity.get()) == 1;
  if (!made) return Error{ErrorCode::kUnsupported, "OpenSSL cannot do TLS 1.3: " + openssl_error()};
  SSL_CTX_set_options(context.get(), SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION);
  SSL_CTX_set_session_cache_mode(context.get(), SSL_SESS_CACHE_OFF);
  // One call to the socket brings several records, instead of two calls for each.
  SSL_CTX_set_read_ahead(context.get(), 1);
  SSL_CTX_set_default_read_buffer_len(context.get(), kReadBytes);
  SSL_CTX_set_mode(context.get(), SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  SSL_CTX_set_psk_use_session_callback(context.get(), offer_key);
  SSL_CTX_set_psk_find_session_callback(context.get(), find_key);
  return TlsContext(std::move(identity), context);
}

TlsStream::TlsStream(TlsContext context, Fd socket, std::unique_ptr<SSL, void (*)(SSL*)> ssl, std::string peer)
    : context_(std::move(context)), socket_(std::move(socket)), ssl_(std::move(ssl)), peer_(std::move(peer)) {}

Result<TlsStream> TlsStream::create(const TlsContext& context, Fd socket, Role role, std::string peer) {
  std::unique_ptr<SSL, void (*)(SSL*)> ssl(SSL_new(context.get()), SSL_free);
  if (ssl == nullptr || SSL_set_fd(ssl.get(), socket.get()) != 1) {
    return Error{ErrorCode::kNoSpace, "begin TLS: " + openssl_error()};
  }
  if (role == Role::kClient) {
    SSL_set_connect_state(ssl.get());
    // A server that shows a certificate instead of using the key would have to show one that we trust, and we trust
    // none.
    SSL_set_verify(ssl.get(), SSL_VERIFY_PEER, nullptr);
  } else {
    SSL_set_accept_state(ssl.get());
  }
  return TlsStream(context, std::move(socket), std::move(ssl), std::move(peer));
}

// errno must be that of the call.
TlsStream::Step TlsStream::step_of(int returned, const char* doing) {
  const int saved = errno;
  switch (SSL_get_error(ssl_.get(), returned)) {
    case SSL_ERROR_WANT_READ:
      return Step::kWantRead;
    case SSL_ERROR_WANT_WRITE:
      return Step::kWantWrite;
    case SSL_ERROR_ZERO_RETURN:
      return Step::kClosed;
    case SSL_ERROR_SYSCALL:
      broken_off_ = true;
      why_ = saved == 0 ? std::string("the connection ended") : errno_error(doing, saved).message;
      return Step::kFailed;
    default:
      why_ = std::string(doing) + ": " + openssl_error();
      return Step::kFailed;
  }
}

TlsStream::Step TlsStream::handshake() {
  if (established_) return Step::kDone;
  ERR_clear_error();
  errno = 0;
  const int returned = SSL_do_handshake(ssl_.get());
  if (returned != 1) {
    const Step step = step_of(returned, "handshake");
    if (step != Step::kFailed && step != Step::kClosed) return step;
    if (!broken_off_) {
      why_ = "no handshake, most likely because it has another secret or cluster name (" + why_ + ")";
    }
    return Step::kFailed;
  }
  // Both sides came here by the key; that it was used is OpenSSL's word.
  established_ = SSL_session_reused(ssl_.get()) == 1;
  if (established_) return Step::kDone;
  why_ = "it did not prove that it knows the cluster's secret";
  return Step::kFailed;
}

TlsStream::Progress TlsStream::read(std::span<std::byte> out) {
  FLEXKV_ASSERT(established_ && !out.empty());
  ERR_clear_error();
  errno = 0;
  std::size_t got = 0;
  const int returned = SSL_read_ex(ssl_.get(), out.data(), out.size(), &got);
  if (returned == 1) return {Step::kDone, got};
  return {step_of(returned, "receive"), 0};
}

TlsStream::Progress TlsStream::write(std::span<const std::byte> bytes) {
  FLEXKV_ASSERT(established_ && !bytes.empty());
  ERR_clear_error();
  errno = 0;
  std::size_t sent = 0;
  const int returned = SSL_write_ex(ssl_.get(), bytes.data(), bytes.size(), &sent);
  if (returned == 1) return {Step::kDone, sent};
  return {step_of(returned, "send"), 0};
}

void TlsStream::say_goodbye() {
  if (!established_) return;
  ERR_clear_error();
  (void)SSL_shutdown(ssl_.get());
  ERR_clear_error();
}

}  // namespace flexkv::net
