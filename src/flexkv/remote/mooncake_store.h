// Objects in a Mooncake Store, through a process of its own (mooncake_process.h). What is put or got is copied through
// memory that the two share, on the lane that calls wait(). Objects that were put are gone when Mooncake needs their
// room, or when whoever lent the memory they are in has ended.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "flexkv/remote/location.h"
#include "flexkv/remote/mooncake_process.h"

namespace flexkv::remote {

class MooncakeStore final : public Store {
 public:
  // Does not wait for anybody; fails without options.helper.
  static Result<std::unique_ptr<Store>> open(const Location& location, const MooncakeOptions& options);

  unsigned width() const override { return MooncakeMemory::kPieces; }
  bool keeps() const override { return false; }
  void begin(OpId id, PutOp op) override { begin_any(id, std::move(op)); }
  void begin(OpId id, GetOp op) override { begin_any(id, std::move(op)); }
  void begin(OpId id, ListOp op) override { begin_any(id, std::move(op)); }
  void abandon(OpId id) override;
  void wait(std::optional<Nanos> until, std::vector<Ended>& ended) override;
  void wake() override { process_->wake(); }

  const MooncakeProcess& process() const { return *process_; }  // for tests

 private:
  using AnyOp = std::variant<std::monostate, PutOp, GetOp, ListOp>;
  struct UnderWay {
    AnyOp op;  // monostate: it was abandoned
    std::shared_ptr<MooncakeMemory> memory;
    std::size_t piece = 0;
  };

  MooncakeStore(std::unique_ptr<MooncakeProcess> process, std::string prefix);
  void begin_any(OpId id, AnyOp op);
  bool start(OpId id, AnyOp& op);
  void fail(OpId id, StoreOutcome outcome, std::string why);
  void take(const MooncakeProcess::Answer& answer);
  void take_names(UnderWay& done, const MooncakeProcess::Answer& answer, Ended& ended) const;

  const std::string prefix_;  // empty, or ends with '/'
  std::map<OpId, UnderWay> under_way_;
  std::deque<std::pair<OpId, AnyOp>> waiting_;    // for a piece
  std::vector<Ended> ended_;                      // to be told of
  std::vector<MooncakeProcess::Answer> answers_;  // scratch
  std::unique_ptr<MooncakeProcess> process_;
};

}  // namespace flexkv::remote
