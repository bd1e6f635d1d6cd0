// TLS 1.3 over a connected TCP socket, with a key that both sides have from the cluster's secret: no certificates, no
// session tickets, no early data. Who does not know the secret gets no further than the handshake.
// TlsContext: immutable, thread-safe. TlsStream: thread-compatible, never blocks.
#pragma once

#include <openssl/types.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"
#include "flexkv/net/secret.h"

namespace flexkv::net {

class TlsContext {
 public:
  // Nodes of clusters of other names are strangers, whatever their secret.
  static Result<TlsContext> create(const Secret& secret, std::string_view cluster);

  SSL_CTX* get() const { return context_.get(); }

  struct Identity;  // name and key

 private:
  TlsContext(std::shared_ptr<Identity> identity, std::shared_ptr<SSL_CTX> context);

  std::shared_ptr<Identity> identity_;
  std::shared_ptr<SSL_CTX> context_;
};

class TlsStream {
 public:
  enum class Role { kClient, kServer };
  enum class Step {
    kDone,
    kWantRead,   // again when the socket is readable
    kWantWrite,  // again when it is writable
    kClosed,     // the peer has ended the connection in good order
    kFailed,     // why() says what; nothing else may be called
  };
  struct Progress {
    Step step = Step::kFailed;
    std::size_t bytes = 0;  // with kDone
  };

  // Takes over a non-blocking socket that is connected or will be. `peer`: its name in messages.
  static Result<TlsStream> create(const TlsContext& context, Fd socket, Role role, std::string peer);

  Step handshake();
  // REQUIRES: the handshake is done, the span is not empty.
  Progress read(std::span<std::byte> out);
  // After kWantWrite or kWantRead the same bytes (they may lie elsewhere) come next.
  Progress write(std::span<const std::byte> bytes);
  // Tells the peer that this is the end and not an accident, if that goes without waiting.
  void say_goodbye();

  int fd() const { return socket_.get(); }
  const std::string& peer() const { return peer_; }
  const std::string& why() const { return why_; }

 private:
  TlsStream(TlsContext context, Fd socket, std::unique_ptr<SSL, void (*)(SSL*)> ssl, std::string peer);
  Step step_of(int returned, const char* doing);

  TlsContext context_;
  Fd socket_;
  std::unique_ptr<SSL, void (*)(SSL*)> ssl_;
  std::string peer_;
  std::string why_;
  bool broken_off_ = false;  // the connection failed, not TLS
  bool established_ = false;
};

}  // namespace flexkv::net
