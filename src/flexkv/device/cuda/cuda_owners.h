// Small owners around the CUDA runtime: errors, the device's context, streams and events. Private to the CUDA form.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <utility>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"

namespace flexkv::device {

// Ok, or the call's name and CUDA's words. The thread's last error is cleared, or the engine would find it as its own.
Status checked(cudaError_t result, const char* call);

// An error if nothing, or no device memory, is at this address.
Status check_device_memory(const void* address);

// The driver's functions come through the runtime, so that no link to libcuda is needed where there is no driver.
template <typename Function>
bool find_driver_function(const char* name, Function* function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  if (cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result) != cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  *function = reinterpret_cast<Function>(found);
  return true;
}

// The primary context of one device, kept alive. Thread-safe. Selecting it by push and pop, not by cudaSetDevice,
// restores the caller's state exactly: setting "device 0" back in a thread that never used CUDA would create a context
// on device 0, and cost every rank's first GPU its memory.
class Context {
 public:
  static Result<std::shared_ptr<Context>> open(int ordinal);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

 private:
  friend class ContextScope;
  Context() = default;

  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  decltype(&cuCtxPushCurrent) push_ = nullptr;
  decltype(&cuCtxPopCurrent) pop_ = nullptr;
  decltype(&cuDevicePrimaryCtxRelease) release_ = nullptr;
};

// Makes a context current in this thread while it lives, and lets the thread call what CUDA otherwise forbids to every
// thread while the engine captures a graph (pinning, for one, would end the capture). Not ok() when the driver is
// shutting down: call nothing then.
class ContextScope {
 public:
  explicit ContextScope(const Context& context);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

  bool ok() const { return ok_; }
  Status status() const;

 private:
  const Context& context_;
  bool ok_;
  cudaStreamCaptureMode capture_mode_ = cudaStreamCaptureModeRelaxed;  // ours, then the caller's
};

// An owned event. Waiting for it sleeps. Created on first record. REQUIRES of all calls, destruction apart: a scope.
class Event {
 public:
  enum class Timing : bool { kOff, kOn };
  explicit Event(std::shared_ptr<Context> context, Timing timing = Timing::kOff)
      : context_(std::move(context)), timing_(timing) {}
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  Status record(cudaStream_t stream);
  // Ok at once when nothing was recorded.
  Status wait() const;
  // Time from `earlier` to this, by the device's clock. REQUIRES: timing is on for both, and both were waited for.
  Result<Nanos> since(const Event& earlier) const;
  // Makes `stream` wait, on the device.
  Status order(cudaStream_t stream) const;

 private:
  std::shared_ptr<Context> context_;
  Timing timing_;
  cudaEvent_t event_ = nullptr;
};

// An owned stream that does not wait for the legacy default stream.
class Stream {
 public:
  static Result<std::unique_ptr<Stream>> create(std::shared_ptr<Context> context);
  // Its kernels are given processors before those of other streams.
  static Result<std::unique_ptr<Stream>> create_urgent(std::shared_ptr<Context> context);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t get() const { return stream_; }

 private:
  explicit Stream(std::shared_ptr<Context> context) : context_(std::move(context)) {}
  static Result<std::unique_ptr<Stream>> create(std::shared_ptr<Context> context, int priority);

  std::shared_ptr<Context> context_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace flexkv::device
