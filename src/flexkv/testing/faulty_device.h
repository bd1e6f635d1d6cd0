// FaultyDevice: another device, with faults where the script says. Thread-safe like every Device; a stalled stream is
// released from any thread. Owns a share of the inner device. Deterministic: faults are numbered by submit, not by
// time.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "flexkv/device/device.h"

namespace flexkv::testing {

struct Fault {
  enum class Kind {
    kRefuse,    // submit() fails and copies nothing; the stream is broken from then on
    kTruncate,  // only the first keep_blocks are copied, which synchronize() reports; the stream is broken from then on
    kStall,     // nothing is copied, and synchronize() and closing the stream wait for release()
    // Unseen by the stream, of the first block of the submit:
    kFlipBit,    // one bit arrives wrong (to the host only)
    kWrongBlock  // the bytes of the next device block are copied in place of its own
  };
  device::Direction direction = device::Direction::kToHost;
  std::uint64_t submit = 0;  // the n-th submit in that direction, over all streams, from 0
  Kind kind = Kind::kRefuse;
  std::size_t keep_blocks = 0;
};

class FaultyDevice final : public device::Device {
 public:
  explicit FaultyDevice(std::shared_ptr<device::Device> inner, std::vector<Fault> script = {});

  void add(const Fault& fault);
  // For the next submit in its direction, whatever `fault.submit`.
  void add_next(Fault fault);
  // Ends every stall, present and future.
  void release();
  // The next `times` calls of register_pool fail.
  void refuse_pool(unsigned times);

  std::string_view name() const override { return "faulty device"; }
  std::uint32_t efficient_copy_bytes() const override { return inner_->efficient_copy_bytes(); }
  std::uint32_t saves_per_sum() const override { return inner_->saves_per_sum(); }
  Status register_pool(std::byte* base, std::size_t bytes) override;
  void unregister_pool() override { inner_->unregister_pool(); }
  Result<std::unique_ptr<device::CopyStream>> open_stream(device::Direction direction,
                                                          const layout::BlockLayout& layout,
                                                          std::span<std::byte> pool) override;
  Result<std::unique_ptr<device::EngineEvent>> record(std::uintptr_t stream) override { return inner_->record(stream); }
  Status order_engine_after(std::uintptr_t engine_stream, device::CopyStream& stream) override;
  Result<std::shared_ptr<device::Gate>> make_gate() override;
  Status read(std::uint64_t address, std::span<std::byte> bytes) override { return inner_->read(address, bytes); }
  Status write(std::uint64_t address, std::span<const std::byte> bytes) override {
    return inner_->write(address, bytes);
  }

 private:
  class Stream;
  class FaultyGate;
  // Shared with the streams.
  struct Script {
    // std's mutex: condition_variable wants it.
    std::mutex mutex;
    std::condition_variable released;
    std::vector<Fault> faults;
    std::uint64_t submits[2] = {0, 0};
    bool open = false;
    unsigned refuse_pool = 0;
  };

  const std::shared_ptr<device::Device> inner_;
  const std::shared_ptr<Script> script_ = std::make_shared<Script>();
};

}  // namespace flexkv::testing
