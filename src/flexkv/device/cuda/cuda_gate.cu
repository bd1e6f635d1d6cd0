#include <atomic>
#include <numeric>

#include "flexkv/device/cuda/cuda_gate.h"
#include "flexkv/device/cuda/cuda_stream.h"

namespace flexkv::device {
namespace {

Status driver_checked(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return {};
  return Error{ErrorCode::kDevice, std::string(call) + ": error " + std::to_string(static_cast<int>(result))};
}

}  // namespace

Result<std::shared_ptr<GateCounters>> GateCounters::create(std::shared_ptr<Context> context) {
  std::shared_ptr<GateCounters> counters(new GateCounters(std::move(context)));
  if (!find_driver_function("cuStreamWaitValue32", &counters->wait_) ||
      !find_driver_function("cuStreamWriteValue32", &counters->write_)) {
    return Error{ErrorCode::kUnsupported, "the CUDA driver has no stream memory operations"};
  }
  ContextScope scope(*counters->context_);
  if (!scope.ok()) return scope.status().error();
  void* page = nullptr;
  Status status = checked(cudaHostAlloc(&page, kCount * sizeof(std::uint32_t), cudaHostAllocMapped), "cudaHostAlloc");
  if (!status) return status.error();
  counters->page_ = static_cast<std::uint32_t*>(page);
  std::fill_n(counters->page_, kCount, 0U);
  void* mapped = nullptr;
  status = checked(cudaHostGetDevicePointer(&mapped, page, 0), "cudaHostGetDevicePointer");
  if (!status) return status.error();
  counters->device_page_ = reinterpret_cast<CUdeviceptr>(mapped);
  MutexLock lock(counters->mutex_);
  counters->free_.resize(kCount);
  std::iota(counters->free_.begin(), counters->free_.end(), 0U);
  return counters;
}

GateCounters::~GateCounters() {
  if (page_ == nullptr) return;
  ContextScope scope(*context_);
  // Waits for the streams that still look at it: all gates are open, so they pass.
  if (scope.ok()) (void)checked(cudaFreeHost(page_), "cudaFreeHost");
}

Result<std::shared_ptr<Gate>> CudaGate::create(std::shared_ptr<GateCounters> counters) {
  std::size_t index = 0;
  {
    MutexLock lock(counters->mutex_);
    if (counters->free_.empty()) return Error{ErrorCode::kNoSpace, "all gates of the CUDA device are in use"};
    index = counters->free_.back();
    counters->free_.pop_back();
  }
  return std::shared_ptr<Gate>(new CudaGate(std::move(counters), index));
}

CudaGate::CudaGate(std::shared_ptr<GateCounters> counters, std::size_t index)
    : counters_(std::move(counters)),
      index_(index),
      base_(std::atomic_ref(*counters_->host(index)).load(std::memory_order_acquire)) {}

CudaGate::~CudaGate() {
  open();
  MutexLock lock(counters_->mutex_);
  counters_->free_.push_back(index_);
}

Status CudaGate::raise_after(CopyStream& stream, std::uint32_t count) {
  auto* cuda_stream = dynamic_cast<CudaStream*>(&stream);
  FLEXKV_ASSERT(cuda_stream != nullptr && count <= kMax);
  ContextScope scope(*counters_->context_);
  if (!scope.ok()) return scope.status();
  // By default it is fenced: the copies before it are seen by whoever sees it.
  return cuda_stream->after_all([&](cudaStream_t after) {
    return driver_checked(counters_->write_(after, address(), base_ + count, CU_STREAM_WRITE_VALUE_DEFAULT),
                          "cuStreamWriteValue32");
  });
}

Status CudaGate::hold(std::uintptr_t engine_stream, std::uint32_t count) {
  FLEXKV_ASSERT(count <= kMax);
  ContextScope scope(*counters_->context_);
  if (!scope.ok()) return scope.status();
  return driver_checked(
      counters_->wait_(reinterpret_cast<CUstream>(engine_stream), address(), base_ + count, CU_STREAM_WAIT_VALUE_GEQ),
      "cuStreamWaitValue32");
}

void CudaGate::open() { std::atomic_ref(*counters_->host(index_)).store(base_ + kMax, std::memory_order_release); }

}  // namespace flexkv::device
