#include "flexkv/testing/faulty_device.h"

#include <algorithm>
#include <optional>

namespace flexkv::testing {

using device::BlockCopy;
using device::CopyStream;
using device::Direction;

class FaultyDevice::Stream final : public CopyStream {
 public:
  Stream(Direction direction, std::unique_ptr<CopyStream> inner, std::shared_ptr<Script> script,
         std::uint32_t block_count, std::span<std::byte> pool)
      : direction_(direction),
        inner_(std::move(inner)),
        script_(std::move(script)),
        block_count_(block_count),
        pool_(pool) {}
  ~Stream() override { (void)synchronize(); }

  CopyStream& inner() { return *inner_; }

  Status order_after(const device::EngineEvent& event) override {
    if (broken_) return *broken_;
    return inner_->order_after(event);
  }

  using CopyStream::submit;
  Status submit(std::span<const BlockCopy> copies, std::size_t part) override {
    if (broken_) return *broken_;
    const std::optional<Fault> fault = next_fault();
    if (fault && fault->kind == Fault::Kind::kRefuse) {
      broken_ = Error{ErrorCode::kDevice, "scripted fault: submit refused"};
      return *broken_;
    }
    if (fault && fault->kind == Fault::Kind::kTruncate) {
      Status kept = inner_->submit(copies.first(std::min(fault->keep_blocks, copies.size())), part);
      broken_ = Error{ErrorCode::kDevice, "scripted fault: copies cut short"};
      return kept;
    }
    if (fault && fault->kind == Fault::Kind::kFlipBit) return submit_flipping(copies, part);
    if (fault && fault->kind == Fault::Kind::kWrongBlock) return submit_wrong(copies, part);
    if (stalled_.empty() && !fault) return inner_->submit(copies, part);
    // Behind a stall everything waits, in order.
    stalled_.push_back({{copies.begin(), copies.end()}, part, nullptr, 0});
    return {};
  }

  Status sum(std::span<const BlockCopy> copies, std::span<std::uint64_t> sums) override {
    if (broken_) return *broken_;
    return inner_->sum(copies, sums);
  }

  Status raise(std::shared_ptr<device::Gate> gate, std::uint32_t count) {
    if (broken_) return *broken_;
    if (stalled_.empty()) return gate->raise_after(*inner_, count);
    stalled_.push_back({{}, 0, std::move(gate), count});
    return {};
  }

  Status synchronize() override {
    if (!stalled_.empty()) {
      std::unique_lock lock(script_->mutex);
      script_->released.wait(lock, [&] { return script_->open; });
    }
    Status status;
    for (const Stalled& step : stalled_) {
      if (!status) break;
      status =
          step.gate != nullptr ? step.gate->raise_after(*inner_, step.count) : inner_->submit(step.copies, step.part);
    }
    stalled_.clear();
    const Status done = inner_->synchronize();
    if (broken_) return *broken_;
    return status ? done : status;
  }

 private:
  Status submit_flipping(std::span<const BlockCopy> copies, std::size_t part) {
    Status status = inner_->submit(copies, part);
    if (status) status = inner_->synchronize();
    if (status) pool_[copies.front().host_offset] ^= std::byte{0x10};
    return status;
  }
  Status submit_wrong(std::span<const BlockCopy> copies, std::size_t part) {
    std::vector<BlockCopy> wrong(copies.begin(), copies.end());
    wrong.front().device_block = (wrong.front().device_block + 1) % block_count_;
    return inner_->submit(wrong, part);
  }

  std::optional<Fault> next_fault() {
    std::lock_guard lock(script_->mutex);
    const std::uint64_t number = script_->submits[static_cast<std::size_t>(direction_)]++;
    for (const Fault& fault : script_->faults) {
      const bool stall_is_over = fault.kind == Fault::Kind::kStall && script_->open;
      if (fault.direction == direction_ && fault.submit == number && !stall_is_over) return fault;
    }
    return std::nullopt;
  }

  const Direction direction_;
  const std::unique_ptr<CopyStream> inner_;
  const std::shared_ptr<Script> script_;
  const std::uint32_t block_count_;
  const std::span<std::byte> pool_;
  struct Stalled {
    std::vector<BlockCopy> copies;
    std::size_t part = kAllParts;
    std::shared_ptr<device::Gate> gate;  // if there is one, it is to be raised and nothing copied
    std::uint32_t count = 0;
  };
  std::vector<Stalled> stalled_;
  std::optional<Error> broken_;
};

class FaultyDevice::FaultyGate final : public device::Gate {
 public:
  explicit FaultyGate(std::shared_ptr<device::Gate> inner) : inner_(std::move(inner)) {}
  ~FaultyGate() override { inner_->open(); }
  Status raise_after(CopyStream& stream, std::uint32_t count) override {
    auto* faulty = dynamic_cast<Stream*>(&stream);
    FLEXKV_ASSERT(faulty != nullptr);
    return faulty->raise(inner_, count);
  }
  Status hold(std::uintptr_t engine_stream, std::uint32_t count) override { return inner_->hold(engine_stream, count); }
  void open() override { inner_->open(); }

 private:
  const std::shared_ptr<device::Gate> inner_;
};

FaultyDevice::FaultyDevice(std::shared_ptr<device::Device> inner, std::vector<Fault> script)
    : inner_(std::move(inner)) {
  script_->faults = std::move(script);
}

void FaultyDevice::add(const Fault& fault) {
  std::lock_guard lock(script_->mutex);
  script_->faults.push_back(fault);
}
void FaultyDevice::add_next(Fault fault) {
  std::lock_guard lock(script_->mutex);
  fault.submit = script_->submits[static_cast<std::size_t>(fault.direction)];
  script_->faults.push_back(fault);
}

void FaultyDevice::release() {
  {
    std::lock_guard lock(script_->mutex);
    script_->open = true;
  }
  script_->released.notify_all();
}

void FaultyDevice::refuse_pool(unsigned times) {
  std::lock_guard lock(script_->mutex);
  script_->refuse_pool = times;
}

Status FaultyDevice::register_pool(std::byte* base, std::size_t bytes) {
  {
    std::lock_guard lock(script_->mutex);
    if (script_->refuse_pool > 0) {
      --script_->refuse_pool;
      return Error{ErrorCode::kDevice, "scripted fault: pool refused"};
    }
  }
  return inner_->register_pool(base, bytes);
}

Result<std::unique_ptr<CopyStream>> FaultyDevice::open_stream(Direction direction, const layout::BlockLayout& layout,
                                                              std::span<std::byte> pool) {
  Result<std::unique_ptr<CopyStream>> inner = inner_->open_stream(direction, layout, pool);
  if (!inner) return inner;
  return std::unique_ptr<CopyStream>(
      std::make_unique<Stream>(direction, std::move(inner).value(), script_, layout.block_count(), pool));
}

Status FaultyDevice::order_engine_after(std::uintptr_t engine_stream, CopyStream& stream) {
  auto* faulty = dynamic_cast<Stream*>(&stream);
  FLEXKV_ASSERT(faulty != nullptr);
  return inner_->order_engine_after(engine_stream, faulty->inner());
}

Result<std::shared_ptr<device::Gate>> FaultyDevice::make_gate() {
  auto inner = inner_->make_gate();
  if (!inner) return inner;
  return std::shared_ptr<device::Gate>(std::make_shared<FaultyGate>(std::move(inner).value()));
}

}  // namespace flexkv::testing
