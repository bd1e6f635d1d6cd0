#include "cluster_checks.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>

#include "flexkv/client/reset_host.h"
#include "flexkv/cluster/wire.h"
#include "flexkv/net/secret.h"
#include "flexkv/peer/probe.h"
#include "flexkv/proto/host_frames.h"
#include "flexkv/remote/store_probe.h"
#include "options.h"

namespace flexkv::bind {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

template <typename T>
T value_or_raise(Result<T> result) {
  if (!result) throw std::runtime_error(result.error().message);
  return std::move(result).value();
}

Nanos nanos(double seconds) { return static_cast<Nanos>(std::clamp(seconds, 0.0, 3600.0) * kSecond); }
double seconds(Nanos nanos) { return static_cast<double>(nanos) / kSecond; }

void check_secret(const std::string& path) { value_or_raise(net::Secret::from_file(path)); }

nb::dict decode_heartbeat(const nb::bytes& bytes, const std::string& place) {
  const auto beat = value_or_raise(cluster::decode_beat({bytes.c_str(), bytes.size()}, place));
  nb::dict out;
  // Another node's words, which need not be text.
  const auto text = [](const std::string& raw) {
    return nb::bytes(raw.data(), raw.size()).attr("decode")("utf-8", "replace");
  };
  out["name"] = text(beat.name);
  out["address"] = text(beat.address);
  out["spaces"] = beat.spaces.size();
  out["condition"] = cluster::condition_name(beat.condition);
  return out;
}

nb::dict probe_peer(const std::string& secret_file, const std::string& cluster, const std::string& own_name,
                    const std::string& address, double within_s, double receive_s) {
  const auto probed = [&] {
    const nb::gil_scoped_release without_gil;
    const auto secret = value_or_raise(net::Secret::from_file(secret_file));
    const auto tls = value_or_raise(net::TlsContext::create(secret, cluster));
    return value_or_raise(peer::probe(tls, {own_name, address, nanos(within_s), nanos(receive_s)}));
  }();
  nb::dict out;
  out["node"] = nb::bytes(probed.node.data(), probed.node.size()).attr("decode")("utf-8", "replace");
  out["greeting_s"] = seconds(probed.greeting);
  out["round_trip_s"] = seconds(probed.round_trip);
  out["bytes_per_s"] = probed.bytes_per_second;
  return out;
}

void reset_host(const std::string& secret_file, const std::string& cluster, const std::string& address,
                double within_s) {
  const auto secret = value_or_raise(net::Secret::from_file(secret_file));
  const auto tls = value_or_raise(net::TlsContext::create(secret, proto::kHostPurpose + cluster));
  const Status done = client::reset_host(tls, address, nanos(within_s));
  if (!done) throw std::runtime_error(done.error().message);
}

nb::list probe_store(const nb::dict& options, double within_s) {
  const server::RemoteOptions remote = remote_options(options);
  const auto steps = [&] {
    const nb::gil_scoped_release without_gil;
    const auto store = value_or_raise(remote::open_store(remote.url, remote.s3, remote.mooncake));
    return remote::probe_store(*store, nanos(within_s));
  }();
  nb::list out;
  for (const auto& step : steps) {
    nb::dict one;
    one["what"] = step.what;
    one["seconds"] = seconds(step.took);
    one["why"] = step.why;
    out.append(one);
  }
  return out;
}

}  // namespace

void bind_cluster_checks(nb::module_& m) {
  m.def("check_secret", &check_secret, "path"_a, nb::call_guard<nb::gil_scoped_release>(),
        "Reads the cluster's secret as a node does. RuntimeError when it cannot be used, without its text.");
  m.def("decode_heartbeat", &decode_heartbeat, "bytes"_a, "place"_a,
        "What a node says of itself at that key of Redis: name, address, spaces, condition (serves, drains, drained or "
        "ends). RuntimeError when it is damaged.");
  m.def("probe_peer", &probe_peer, "secret_file"_a, "cluster"_a, "own_name"_a, "address"_a, "within_s"_a, "receive_s"_a,
        "Connects to another node as a reader does, asks for no block: node, greeting_s, round_trip_s, bytes_per_s (0 "
        "without receive_s). RuntimeError when it cannot, within within_s.");
  m.def("reset_host", &reset_host, "secret_file"_a, "cluster"_a, "address"_a, "within_s"_a,
        nb::call_guard<nb::gil_scoped_release>(),
        "Has the node that lets schedulers of other machines in at that HOST:PORT forget all blocks. RuntimeError "
        "unless it "
        "has said that it did, within within_s.");
  m.def(
      "probe_store", &probe_store, "options"_a, "within_s"_a,
      "Lists, writes and reads in the store of these options of a Node, within within_s each: what, seconds and why it "
      "failed (empty: it did not), for each. RuntimeError when the options cannot be used.");
}

}  // namespace flexkv::bind
