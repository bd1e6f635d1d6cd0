#include "flexkv/device/host_device.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>

#include "flexkv/base/block_sum.h"

namespace flexkv::device {
namespace {

std::byte* pointer(std::uint64_t address) { return reinterpret_cast<std::byte*>(address); }

class HostStream final : public CopyStream {
 public:
  HostStream(Direction direction, const layout::BlockLayout& layout, std::span<std::byte> pool)
      : direction_(direction), layout_(layout), pool_(pool) {}

  Status order_after(const EngineEvent&) override { return {}; }

  using CopyStream::submit;
  Status submit(std::span<const BlockCopy> copies, std::size_t part) override {
    if (Status status = check_copies(copies, layout_, pool_.size()); !status) return status;
    FLEXKV_ASSERT(part == kAllParts || part < layout_.parts().size());
    for (const BlockCopy& copy : copies) {
      std::byte* host = pool_.data() + copy.host_offset;
      if (part == kAllParts) {
        layout_.for_each_run(copy.device_block, [&](std::uint64_t address, std::uint32_t offset, std::uint32_t bytes) {
          copy_run(address, host + offset, bytes);
        });
        continue;
      }
      for (const layout::Rectangle& r : layout_.parts()[part].rectangles) {
        const std::uint64_t address = r.address + copy.device_block * r.block_stride;
        for (std::uint64_t row = 0; row < r.rows; ++row) {
          copy_run(address + row * r.row_step, host + r.host_offset + row * r.host_step, r.row_bytes);
        }
      }
    }
    return {};
  }

  Status sum(std::span<const BlockCopy> copies, std::span<std::uint64_t> sums) override {
    FLEXKV_ASSERT(direction_ == Direction::kToHost && copies.size() == sums.size());
    if (Status status = check_copies(copies, layout_, pool_.size()); !status) return status;
    for (std::size_t i = 0; i < copies.size(); ++i) {
      BlockSummer summer;
      layout_.for_each_run(copies[i].device_block, [&](std::uint64_t address, std::uint32_t, std::uint32_t bytes) {
        summer.add({pointer(address), bytes});
      });
      sums[i] = summer.value();
    }
    return {};
  }

  Status synchronize() override { return {}; }

 private:
  void copy_run(std::uint64_t address, std::byte* host, std::size_t bytes) const {
    if (direction_ == Direction::kToHost) {
      std::memcpy(host, pointer(address), bytes);
    } else {
      std::memcpy(pointer(address), host, bytes);
    }
  }

  const Direction direction_;
  const layout::BlockLayout layout_;
  const std::span<std::byte> pool_;
};

class HostGate final : public Gate {
 public:
  ~HostGate() override { open(); }
  Status raise_after(CopyStream&, std::uint32_t count) override {
    raise(count);  // copies are done when submit() returns
    return {};
  }
  Status hold(std::uintptr_t, std::uint32_t count) override {
    std::unique_lock lock(mutex_);
    raised_.wait(lock, [&] { return count_ >= count; });
    return {};
  }
  void open() override { raise(kMax); }

 private:
  void raise(std::uint32_t count) {
    {
      std::lock_guard lock(mutex_);
      count_ = std::max(count_, count);
    }
    raised_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable raised_;
  std::uint32_t count_ = 0;
};

class HostDevice final : public Device {
 public:
  explicit HostDevice(std::uint32_t saves_per_sum) : saves_per_sum_(saves_per_sum) {}

  std::string_view name() const override { return "host memory"; }
  std::uint32_t efficient_copy_bytes() const override { return 1; }
  std::uint32_t saves_per_sum() const override { return saves_per_sum_; }
  Status register_pool(std::byte*, std::size_t) override { return {}; }
  void unregister_pool() override {}

  Result<std::unique_ptr<CopyStream>> open_stream(Direction direction, const layout::BlockLayout& layout,
                                                  std::span<std::byte> pool) override {
    return std::unique_ptr<CopyStream>(std::make_unique<HostStream>(direction, layout, pool));
  }

  Result<std::unique_ptr<EngineEvent>> record(std::uintptr_t) override { return std::make_unique<EngineEvent>(); }
  Status order_engine_after(std::uintptr_t, CopyStream&) override { return {}; }
  Result<std::shared_ptr<Gate>> make_gate() override { return std::shared_ptr<Gate>(std::make_shared<HostGate>()); }

  Status read(std::uint64_t address, std::span<std::byte> bytes) override {
    std::memcpy(bytes.data(), pointer(address), bytes.size());
    return {};
  }
  Status write(std::uint64_t address, std::span<const std::byte> bytes) override {
    std::memcpy(pointer(address), bytes.data(), bytes.size());
    return {};
  }

 private:
  const std::uint32_t saves_per_sum_;
};

}  // namespace

Result<std::shared_ptr<Device>> open_host_device(std::uint32_t saves_per_sum) {
  return std::shared_ptr<Device>(std::make_shared<HostDevice>(saves_per_sum));
}

}  // namespace flexkv::device
