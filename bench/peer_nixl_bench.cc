// What a node reads out of another one's memory through NIXL, beside NIXL's own transfer of the same bytes: one read
// for each block, all of them ordered at once, and asked about without a pause until they have ended. The two take
// turns. All in one process; UCX takes the way that UCX_TLS leaves it.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstring>

#include "bench/peer_load.h"
#include "bench/suites.h"
#include "flexkv/peer/nixl_reads.h"

namespace flexkv::bench {
namespace {

// Two agents, the memory of one of which the other one reads.
class Raw {
 public:
  Raw(const net::NixlLibrary& library, std::span<std::byte> source, std::span<std::byte> target)
      : owner_(net::NixlAgent::create(library, "raw owner").value()),
        reader_(net::NixlAgent::create(library, "raw reader").value()) {
    for (const Status& done : {owner_->register_memory(source), reader_->register_memory(target),
                               reader_->add("raw owner", owner_->metadata().value())}) {
      FLEXKV_ASSERT(done.ok());
    }
  }
  void copy(const Blocks& from, const Blocks& to) const {
    using Progress = net::NixlAgent::Progress;
    std::vector<net::NixlAgent::Transfer> reads;
    for (std::size_t i = 0; i < from.size(); ++i) {
      reads.push_back(reader_->read("raw owner", reinterpret_cast<std::uintptr_t>(from[i].data()), to[i]).value());
    }
    while (!reads.empty()) {
      std::erase_if(reads, [](auto& read) {
        const Progress progress = read.poll();
        FLEXKV_ASSERT(progress != Progress::kFailed);
        return progress == Progress::kDone;
      });
    }
  }

 private:
  std::unique_ptr<net::NixlAgent> owner_;
  std::unique_ptr<net::NixlAgent> reader_;
};

void bm_read(benchmark::State& state, const net::NixlLibrary& library) {
  const auto block_bytes = static_cast<std::size_t>(state.range(0)) << 10;
  std::vector<std::byte> source = random_bytes();
  std::vector<std::byte> target(kBytes);
  const Blocks from = blocks_of(source, block_bytes);
  const Blocks to = blocks_of(target, block_bytes);
  const Raw raw(library, source, target);
  const auto at_owner = peer::NixlReads::start(library, "owner", source).value();
  const auto at_reader = peer::NixlReads::start(library, "reader", target).value();
  Peers peers(from, at_owner.get(), at_reader.get());
  const auto check = [&] {
    if (std::memcmp(source.data(), target.data(), kBytes) != 0) state.SkipWithError("wrong bytes");
    std::ranges::fill(target, std::byte{0});
  };
  peers.read(to);  // connects both
  raw.copy(from, to);

  Costs nixl_peer;
  Costs nixl;
  for (auto _ : state) {
    nixl_peer.take([&] { peers.read(to); });
    check();
    nixl.take([&] { raw.copy(from, to); });
    check();
    state.SetIterationTime(nixl_peer.seconds.back());
  }
  const peer::ReadingStats stats = peers.read_stats().read;
  if (stats.one_sided_blocks < stats.blocks) state.SkipWithError("blocks came as bytes");
  show(state, "peer", nixl_peer);
  show(state, "nixl", nixl);
  state.counters["peer/nixl"] = ratio(nixl_peer, nixl);
}

}  // namespace

Status register_peers_through_nixl(const std::string& path) {
  const auto library = net::NixlLibrary::load(path);
  if (!library.ok()) return library.error();
  benchmark::RegisterBenchmark("read_through_nixl", [library = library.value()](benchmark::State& state) {
    bm_read(state, library);
  })->Apply(in_turns);
  return {};
}

}  // namespace flexkv::bench
