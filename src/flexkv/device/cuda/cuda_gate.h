// Gates on the driver's stream memory operations: a counter in pinned memory that one stream writes and others wait
// for. Private to the CUDA form. Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "flexkv/base/mutex.h"
#include "flexkv/device/cuda/cuda_owners.h"
#include "flexkv/device/device.h"

namespace flexkv::device {

// The counters of a device's gates, in one page. A counter only ever grows, also from one gate to the next that uses
// it: an engine's stream that comes late to a wait finds it passed.
class GateCounters {
 public:
  static Result<std::shared_ptr<GateCounters>> create(std::shared_ptr<Context> context);
  ~GateCounters();
  GateCounters(const GateCounters&) = delete;
  GateCounters& operator=(const GateCounters&) = delete;

 private:
  friend class CudaGate;
  static constexpr std::size_t kCount = 1024;

  explicit GateCounters(std::shared_ptr<Context> context) : context_(std::move(context)) {}

  std::uint32_t* host(std::size_t index) const { return page_ + index; }

  const std::shared_ptr<Context> context_;
  decltype(&cuStreamWaitValue32) wait_ = nullptr;
  decltype(&cuStreamWriteValue32) write_ = nullptr;
  std::uint32_t* page_ = nullptr;
  CUdeviceptr device_page_ = 0;
  Mutex mutex_;
  std::vector<std::size_t> free_ FLEXKV_GUARDED_BY(mutex_);
};

class CudaGate final : public Gate {
 public:
  static Result<std::shared_ptr<Gate>> create(std::shared_ptr<GateCounters> counters);
  ~CudaGate() override;

  Status raise_after(CopyStream& stream, std::uint32_t count) override;
  Status hold(std::uintptr_t engine_stream, std::uint32_t count) override;
  void open() override;

 private:
  CudaGate(std::shared_ptr<GateCounters> counters, std::size_t index);

  CUdeviceptr address() const { return counters_->device_page_ + index_ * sizeof(std::uint32_t); }

  const std::shared_ptr<GateCounters> counters_;
  const std::size_t index_;
  const std::uint32_t base_;  // what the counter held when this gate got it: its count is what was added since
};

}  // namespace flexkv::device
