#include "flexkv/device/host_device.h"

#include <cstring>

namespace flexkv::device {
namespace {

std::byte* pointer(std::uint64_t address) { return reinterpret_cast<std::byte*>(address); }

class HostStream final : public CopyStream {
 public:
  HostStream(Direction direction, const layout::BlockLayout& layout, std::span<std::byte> pool)
      : direction_(direction), layout_(layout), pool_(pool) {}

  Status order_after(const EngineEvent&) override { return {}; }

  Status submit(std::span<const BlockCopy> copies) override {
    if (Status status = check_copies(copies, layout_, pool_.size()); !status) return status;
    for (const BlockCopy& copy : copies) {
      std::byte* host = pool_.data() + copy.host_offset;
      layout_.for_each_run(copy.device_block, [&](std::uint64_t address, std::uint32_t offset, std::uint32_t bytes) {
        if (direction_ == Direction::kToHost) {
          std::memcpy(host + offset, pointer(address), bytes);
        } else {
          std::memcpy(pointer(address), host + offset, bytes);
        }
      });
    }
    return {};
  }

  Status synchronize() override { return {}; }

 private:
  const Direction direction_;
  const layout::BlockLayout layout_;
  const std::span<std::byte> pool_;
};

class HostDevice final : public Device {
 public:
  std::string_view name() const override { return "host memory"; }
  Status register_pool(std::byte*, std::size_t) override { return {}; }
  void unregister_pool() override {}

  Result<std::unique_ptr<CopyStream>> open_stream(Direction direction, const layout::BlockLayout& layout,
                                                  std::span<std::byte> pool) override {
    return std::unique_ptr<CopyStream>(std::make_unique<HostStream>(direction, layout, pool));
  }

  Result<std::unique_ptr<EngineEvent>> record(std::uintptr_t) override { return std::make_unique<EngineEvent>(); }
  Status order_engine_after(std::uintptr_t, CopyStream&) override { return {}; }

  Status read(std::uint64_t address, std::span<std::byte> bytes) override {
    std::memcpy(bytes.data(), pointer(address), bytes.size());
    return {};
  }
  Status write(std::uint64_t address, std::span<const std::byte> bytes) override {
    std::memcpy(pointer(address), bytes.data(), bytes.size());
    return {};
  }
};

}  // namespace

Result<std::shared_ptr<Device>> open_host_device() { return std::shared_ptr<Device>(std::make_shared<HostDevice>()); }

}  // namespace flexkv::device
