// The Device on one NVIDIA GPU, and the library's entry point.
#include <string>

#include "flexkv/base/log.h"
#include "flexkv/base/mutex.h"
#include "flexkv/device/cuda/cuda_device_form.h"
#include "flexkv/device/cuda/cuda_gate.h"
#include "flexkv/device/cuda/cuda_stream.h"
#include "flexkv/device/cuda_abi.h"

namespace flexkv::device {
namespace {

class CudaDevice final : public Device {
 public:
  static Result<std::shared_ptr<Device>> open(int ordinal, std::uint32_t stage_below) {
    Result<std::shared_ptr<Context>> context = Context::open(ordinal);
    if (!context) return context.error();
    ContextScope scope(*context.value());
    if (!scope.ok()) return scope.status().error();
    cudaDeviceProp properties{};
    Status status = checked(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
    if (!status) return status.error();
    Result<std::unique_ptr<Stream>> plain = Stream::create(context.value());
    if (!plain) return plain.error();
    const std::string name = "CUDA device " + std::to_string(ordinal) + " (" + properties.name + ")";
    return std::shared_ptr<Device>(
        new CudaDevice(std::move(context).value(), std::move(plain).value(), name, properties.memPitch, stage_below));
  }

  ~CudaDevice() override { unregister_pool(); }

  std::string_view name() const override { return name_; }
  std::uint32_t efficient_copy_bytes() const override { return 512U << 10; }
  std::uint32_t saves_per_sum() const override { return 1; }

  Status register_pool(std::byte* base, std::size_t bytes) override {
    ContextScope scope(*context_);
    return scope.ok() ? pinned_->register_all(base, bytes) : scope.status();
  }

  void unregister_pool() override {
    ContextScope scope(*context_);
    if (scope.ok()) pinned_->unregister();
  }

  Result<std::unique_ptr<CopyStream>> open_stream(Direction direction, const layout::BlockLayout& layout,
                                                  std::span<std::byte> pool) override {
    ContextScope scope(*context_);
    if (!scope.ok()) return scope.status().error();
    Result<std::unique_ptr<Stream>> stream = Stream::create(context_);
    if (!stream) return stream.error();
    std::unique_ptr<Staging> staging;
    if (direction == Direction::kToDevice && Staging::suits(layout, stage_below_)) {
      auto created = Staging::create(context_, layout);
      if (created) {
        staging = std::move(created).value();
      } else {
        log_warning(name_ +
                    ": no memory for staging, short runs will be copied one by one: " + created.error().message);
      }
    }
    std::unique_ptr<Sums> sums;
    if (direction == Direction::kToHost) {
      auto created = Sums::create(context_, layout);
      if (created) {
        sums = std::move(created).value();
      } else {
        log_warning(name_ + ": no memory for sums, what is saved cannot be checked: " + created.error().message);
      }
    }
    return std::unique_ptr<CopyStream>(std::make_unique<CudaStream>(context_, pinned_, std::move(stream).value(),
                                                                    std::move(staging), std::move(sums), direction,
                                                                    layout, pool, max_pitch_));
  }

  Result<std::unique_ptr<EngineEvent>> record(std::uintptr_t engine_stream) override {
    ContextScope scope(*context_);
    if (!scope.ok()) return scope.status().error();
    auto event = std::make_unique<CudaEngineEvent>(context_);
    Status status = event->event.record(reinterpret_cast<cudaStream_t>(engine_stream));
    if (!status) return status.error();
    return std::unique_ptr<EngineEvent>(std::move(event));
  }

  Status order_engine_after(std::uintptr_t engine_stream, CopyStream& stream) override {
    auto* cuda_stream = dynamic_cast<CudaStream*>(&stream);
    FLEXKV_ASSERT(cuda_stream != nullptr);
    ContextScope scope(*context_);
    if (!scope.ok()) return scope.status();
    return cuda_stream->order_engine(reinterpret_cast<cudaStream_t>(engine_stream));
  }

  Result<std::shared_ptr<Gate>> make_gate() override {
    std::shared_ptr<GateCounters> counters;
    {
      MutexLock lock(mutex_);
      if (gates_ == nullptr) {
        auto created = GateCounters::create(context_);
        if (!created) return created.error();
        gates_ = std::move(created).value();
      }
      counters = gates_;
    }
    return CudaGate::create(std::move(counters));
  }

  Status read(std::uint64_t address, std::span<std::byte> bytes) override {
    return copy(bytes.data(), reinterpret_cast<const void*>(address), bytes.size(), cudaMemcpyDeviceToHost);
  }

  Status write(std::uint64_t address, std::span<const std::byte> bytes) override {
    return copy(reinterpret_cast<void*>(address), bytes.data(), bytes.size(), cudaMemcpyHostToDevice);
  }

 private:
  CudaDevice(std::shared_ptr<Context> context, std::unique_ptr<Stream> plain, std::string name, std::size_t max_pitch,
             std::uint32_t stage_below)
      : context_(std::move(context)),
        name_(std::move(name)),
        max_pitch_(max_pitch),
        stage_below_(stage_below),
        plain_(std::move(plain)) {}

  // Not on the default stream: cudaMemcpy from pageable memory may return before the bytes arrive.
  Status copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    ContextScope scope(*context_);
    if (!scope.ok()) return scope.status();
    MutexLock lock(mutex_);
    Status status = checked(cudaMemcpyAsync(to, from, bytes, kind, plain_->get()), "cudaMemcpyAsync");
    if (!status) return status;
    return checked(cudaStreamSynchronize(plain_->get()), "cudaStreamSynchronize");
  }

  const std::shared_ptr<Context> context_;
  const std::shared_ptr<PinnedPool> pinned_ = std::make_shared<PinnedPool>();
  const std::string name_;
  const std::size_t max_pitch_;
  const std::uint32_t stage_below_;
  Mutex mutex_;                                                    // one plain copy at a time
  std::shared_ptr<GateCounters> gates_ FLEXKV_GUARDED_BY(mutex_);  // made when first wanted
  const std::unique_ptr<Stream> plain_ FLEXKV_GUARDED_BY(mutex_);
};

}  // namespace

Result<std::shared_ptr<Device>> open_cuda_form(int ordinal, std::uint32_t stage_below) {
  return CudaDevice::open(ordinal, stage_below);
}

}  // namespace flexkv::device

extern "C" __attribute__((visibility("default"))) flexkv::device::CudaOpened flexkv_cuda_open(
    std::uint32_t abi, int ordinal, std::uint32_t stage_below, std::shared_ptr<flexkv::device::Device>* device,
    flexkv::Error* error) {
  using flexkv::device::CudaOpened;
  if (abi != flexkv::device::kCudaAbi) return CudaOpened::kOtherAbi;
  auto opened = flexkv::device::open_cuda_form(ordinal, stage_below);
  if (!opened) {
    *error = opened.error();
    return CudaOpened::kFailed;
  }
  *device = std::move(opened).value();
  return CudaOpened::kOk;
}
