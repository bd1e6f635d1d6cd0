// Imports, loads, saves, loans, cancellations and resets in every order.
#include "flexkv/node/import_fixture.h"

namespace flexkv::node {
namespace {

// Every block that a rank or a borrower is told of has the bytes of its key, whatever happens in which order.
class RandomImports : public NodeImportTest, public ::testing::WithParamInterface<std::uint64_t> {
 protected:
  static constexpr std::uint32_t kPrompts = 6;
  static constexpr std::uint32_t kBlocks = 8;
  static constexpr std::uint32_t kShared = 3;

  void run(std::uint64_t seed) {
    prng = Prng(seed);
    agents.clear();
    messages.clear();
    results.clear();
    remote = {};
    brought.clear();
    loans.clear();
    lent_keys.clear();
    content.clear();
    start(12 + prng.below(20));
    const auto e = engine("e");
    for (int step = 0; step < 400; ++step) {
      now += static_cast<Nanos>(prng.below(50)) * kMillisecond;
      act(e);
      node->check_invariants();
      if (HasFatalFailure()) return;
    }
    while (!remote.reads.empty()) bring_some();
    while (!open.empty()) report_one(0);
    for (const auto& [id, keys] : lent_keys) node->end_loan(id, now);
    node->check_invariants();
    EXPECT_EQ(node->jobs_in_flight(), 0U);
  }

  Keys some_keys() { return keys_of(1 + prng.below(kPrompts), 1 + prng.below(kBlocks), kShared); }

  void act(EngineHandle e) {
    const Keys keys = some_keys();
    switch (prng.below(10)) {
      case 0:
      case 1:
        store(keys);
        break;
      case 2: {
        const SequenceId sequence = ++last;
        lookup(e, sequence, keys);
        const auto first = static_cast<std::uint32_t>(prng.below(keys.size()));
        if (load(e, sequence, sequence, keys, first) == Reason::kNone) {
          open.push_back({sequence, false, Keys(keys.begin() + first, keys.end())});
        }
        break;
      }
      case 3:
        ++last;
        if (save(e, last, last, keys) == Reason::kNone && !result(last)) open.push_back({last, true, keys});
        break;
      case 4:
        node->prefetch(e, {++last, 0, keys}, now);
        break;
      case 5:
        if (!open.empty()) node->cancel(e, open[prng.below(open.size())].job);
        break;
      case 6:
        if (prng.below(10) == 0) node->reset(e, now);
        if (prng.below(5) == 0) remote.stored.clear();
        node->on_time(now);
        break;
      case 7:
        borrow(keys);
        break;
      case 8:
        if (!open.empty()) report_one(prng.below(open.size()));
        break;
      default:
        if (!remote.reads.empty()) bring_some();
    }
    node->close_sequence(e, prng.below(last + 1));
  }

  // The first block or blocks of a read, or its end.
  void bring_some() {
    const std::size_t at = prng.below(remote.reads.size());
    RemoteRead& read = remote.reads[at];
    std::uint32_t& came = brought[read.op];
    if (came < read.host_offsets.size() && prng.below(3) > 0) {
      content[read.host_offsets[came]] = read.keys[read.first + came];
      node->on_remote_block(read.op, came++, now);
      return;
    }
    // Until its end the port may write to what has not come.
    for (std::size_t i = came; i < read.host_offsets.size(); ++i) content.erase(read.host_offsets[i]);
    const RemoteOp op = read.op;
    const RemoteOutcome outcome = came == read.host_offsets.size() ? RemoteOutcome::kDone
                                  : remote.canceled.contains(op)   ? RemoteOutcome::kCanceled
                                                                   : RemoteOutcome::kMissing;
    remote.reads.erase(remote.reads.begin() + static_cast<std::ptrdiff_t>(at));
    node->on_remote_end(op, outcome, now);
  }

  struct Open {
    JobId job;
    bool save;
    Keys keys;
  };
  void report_one(std::size_t at) {
    const Open one = open[at];
    bool last_piece = false;
    std::vector<std::uint64_t> offsets;
    std::vector<std::uint32_t> which;  // of the blocks of the job
    for (const auto& piece : sent<proto::CopyCommand>(agents[0], one.job)) {
      last_piece |= piece.last;
      for (const auto& copy : piece.blocks()) {
        offsets.push_back(copy.host_offset);
        if (one.save) which.push_back(copy.device_block - 100);
      }
      for (const auto& [first, count] : piece.spans) {
        for (std::uint32_t i = 0; i < count; ++i) which.push_back(first + i);
      }
    }
    const bool stopped = !sent<proto::CancelCommand>(agents[0], one.job).empty();
    if (!last_piece && !stopped) {  // more is to come
      if (remote.reads.empty()) ADD_FAILURE() << "job " << one.job << " waits for nothing";
      if (!remote.reads.empty()) bring_some();
      return;
    }
    for (std::size_t i = 0; i < offsets.size(); ++i) {
      if (one.save) {
        if (!stopped) content[offsets[i]] = one.keys[which[i]];
        continue;
      }
      ASSERT_TRUE(content.contains(offsets[i])) << "job " << one.job;
      ASSERT_EQ(content.at(offsets[i]), one.keys[which[i]]) << "job " << one.job;
    }
    open.erase(open.begin() + static_cast<std::ptrdiff_t>(at));
    report(agents[0], one.job, stopped ? JobStatus::kCanceled : JobStatus::kDone);
  }

  void borrow(const Keys& keys) {
    const LoanId id = ++last;
    const auto first = static_cast<std::uint32_t>(prng.below(keys.size()));
    const Loan& loan = lend(id, keys, first);
    lent_keys[id] = Keys(keys.begin() + first, keys.end());
    check_loan(loan);
    if (prng.below(2) == 0) return;
    const auto old = lent_keys.begin();
    check_loan(loans.at(old->first));
    node->end_loan(old->first, now);
    lent_keys.erase(old);
  }
  void check_loan(const Loan& loan) {
    for (std::size_t i = 0; i < loan.host_offsets.size(); ++i) {
      ASSERT_TRUE(content.contains(loan.host_offsets[i]));
      ASSERT_EQ(content.at(loan.host_offsets[i]), lent_keys.at(loan.id)[i]);
    }
  }

  Prng prng{0};
  SequenceId last = 0;
  std::vector<Open> open;
  std::map<std::uint64_t, key::BlockKey> content;  // of the pool
  std::map<RemoteOp, std::uint32_t> brought;
  std::map<LoanId, Keys> lent_keys;
};

TEST_P(RandomImports, DeliverTheBytesOfTheirKeys) {
  for (std::uint64_t seed = 0; seed < 100 && !HasFailure(); ++seed) {
    SCOPED_TRACE(seed);
    run(100 * GetParam() + seed);
  }
}
INSTANTIATE_TEST_SUITE_P(Seeds, RandomImports, ::testing::Range<std::uint64_t>(0, 20));

}  // namespace
}  // namespace flexkv::node
