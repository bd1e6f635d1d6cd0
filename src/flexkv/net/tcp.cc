#include "flexkv/net/tcp.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <memory>

namespace flexkv::net {
namespace {

// After these without an answer the other machine is taken to be gone.
constexpr int kKeepIdleSeconds = 5;
constexpr int kKeepIntervalSeconds = 2;
constexpr int kKeepProbes = 3;
constexpr unsigned kUnansweredMilliseconds = 10'000;

using Addresses = std::unique_ptr<addrinfo, void (*)(addrinfo*)>;

Error bad_address(const std::string& address, const std::string& why) {
  return {ErrorCode::kInvalidArgument, "\"" + address + "\" is not an address of the form HOST:PORT: " + why};
}

Result<Addresses> resolve(const std::string& address, int flags) {
  const std::size_t colon = address.rfind(':');
  if (colon == std::string::npos) return bad_address(address, "there is no port");
  std::string host = address.substr(0, colon);
  const std::string port = address.substr(colon + 1);
  const bool bracketed = host.size() >= 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  if (host.empty()) return bad_address(address, "there is no host");
  if (!bracketed && host.find(':') != std::string::npos) {
    return bad_address(address, "write an IPv6 address in brackets, as [::1]:6380");
  }
  const bool number = !port.empty() && port.size() <= 5 && port.find_first_not_of("0123456789") == std::string::npos;
  if (!number || std::stoul(port) > 65535) return bad_address(address, "the port is not a number up to 65535");
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int problem = ::getaddrinfo(host.c_str(), port.c_str(), &hints, &found);
  if (problem != 0) return bad_address(address, ::gai_strerror(problem));
  return Addresses(found, ::freeaddrinfo);
}

template <typename Value>
bool set(const Fd& socket, int level, int option, Value value) {
  return ::setsockopt(socket.get(), level, option, &value, sizeof value) == 0;
}

Status prepare(const Fd& socket) {
  const bool done = set(socket, IPPROTO_TCP, TCP_NODELAY, 1) && set(socket, SOL_SOCKET, SO_KEEPALIVE, 1) &&
                    set(socket, IPPROTO_TCP, TCP_KEEPIDLE, kKeepIdleSeconds) &&
                    set(socket, IPPROTO_TCP, TCP_KEEPINTVL, kKeepIntervalSeconds) &&
                    set(socket, IPPROTO_TCP, TCP_KEEPCNT, kKeepProbes) &&
                    set(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, kUnansweredMilliseconds);
  if (!done) return errno_error("set options of a TCP socket", errno);
  return {};
}

std::string text_of(const sockaddr_storage& address, socklen_t size) {
  std::array<char, NI_MAXHOST> host{};
  std::array<char, NI_MAXSERV> port{};
  const int problem = ::getnameinfo(reinterpret_cast<const sockaddr*>(&address), size, host.data(), host.size(),
                                    port.data(), port.size(), NI_NUMERICHOST | NI_NUMERICSERV);
  if (problem != 0) return "unknown";
  const std::string name = host.data();
  return (address.ss_family == AF_INET6 ? "[" + name + "]" : name) + ":" + port.data();
}

}  // namespace

Result<Fd> listen_tcp(const std::string& address) {
  auto found = resolve(address, AI_PASSIVE);
  if (!found.ok()) return found.error();
  const addrinfo& first = *found.value();
  Fd socket(::socket(first.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.valid()) return errno_error("make a TCP socket", errno);
  // So that a node which starts anew need not wait for what the last one's connections left in the kernel.
  if (!set(socket, SOL_SOCKET, SO_REUSEADDR, 1)) return errno_error("set SO_REUSEADDR", errno);
  if (::bind(socket.get(), first.ai_addr, first.ai_addrlen) != 0 || ::listen(socket.get(), SOMAXCONN) != 0) {
    return errno_error("listen at " + address, errno);
  }
  return socket;
}

Result<std::string> local_address(const Fd& socket) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  if (::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    return errno_error("ask for a socket's address", errno);
  }
  return text_of(address, size);
}

std::string peer_address(const Fd& socket) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  if (::getpeername(socket.get(), reinterpret_cast<sockaddr*>(&address), &size) != 0) return "unknown";
  return text_of(address, size);
}

Result<Fd> accept_tcp(const Fd& listener) {
  while (true) {
    Fd socket(::accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!socket.valid()) {
      if (errno == EAGAIN || errno == EWOULDBLOCK) return Fd();
      // It went away again, or something between the machines is broken: not the listener.
      if (errno == EINTR || errno == ECONNABORTED || errno == EPROTO || errno == ENETDOWN || errno == EHOSTDOWN ||
          errno == EHOSTUNREACH || errno == ENETUNREACH || errno == ENOPROTOOPT || errno == EOPNOTSUPP) {
        continue;
      }
      return errno_error("accept a connection", errno);
    }
    if (const Status prepared = prepare(socket); !prepared.ok()) continue;
    return socket;
  }
}

Result<std::string> resolve_tcp(const std::string& address) {
  auto found = resolve(address, 0);
  if (!found.ok()) return found.error();
  sockaddr_storage first{};
  std::memcpy(&first, found.value()->ai_addr, found.value()->ai_addrlen);
  return text_of(first, found.value()->ai_addrlen);
}

Result<Fd> connect_tcp(const std::string& address) {
  auto found = resolve(address, AI_NUMERICHOST);
  if (!found.ok()) return found.error();
  const addrinfo& first = *found.value();
  Fd socket(::socket(first.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.valid()) return errno_error("make a TCP socket", errno);
  if (const Status prepared = prepare(socket); !prepared.ok()) return prepared.error();
  if (::connect(socket.get(), first.ai_addr, first.ai_addrlen) != 0 && errno != EINPROGRESS) {
    return Error{ErrorCode::kPeer, errno_error("connect to " + address, errno).message};
  }
  return socket;
}

}  // namespace flexkv::net
