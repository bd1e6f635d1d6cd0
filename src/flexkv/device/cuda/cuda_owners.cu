#include "flexkv/device/cuda/cuda_owners.h"

namespace flexkv::device {
Status checked(cudaError_t result, const char* call) {
  if (result == cudaSuccess) return {};
  (void)cudaGetLastError();
  return Error{ErrorCode::kDevice,
               std::string(call) + ": " + cudaGetErrorString(result) + " (" + cudaGetErrorName(result) + ")"};
}

Status check_device_memory(const void* address) {
  cudaPointerAttributes attributes{};
  Status status = checked(cudaPointerGetAttributes(&attributes, address), "cudaPointerGetAttributes");
  if (!status || attributes.type == cudaMemoryTypeDevice) return status;
  return Error{ErrorCode::kDevice, "the engine's KV memory is no CUDA device memory any more"};
}

Result<std::shared_ptr<Context>> Context::open(int ordinal) {
  int count = 0;
  if (Status status = checked(cudaGetDeviceCount(&count), "cudaGetDeviceCount"); !status) return status.error();
  if (ordinal < 0 || ordinal >= count) {
    return Error{ErrorCode::kInvalidArgument,
                 "there is no CUDA device " + std::to_string(ordinal) + ", only " + std::to_string(count)};
  }
  std::shared_ptr<Context> context(new Context);
  decltype(&cuDeviceGet) get = nullptr;
  decltype(&cuDevicePrimaryCtxRetain) retain = nullptr;
  if (!find_driver_function("cuCtxPushCurrent", &context->push_) ||
      !find_driver_function("cuCtxPopCurrent", &context->pop_) ||
      !find_driver_function("cuDevicePrimaryCtxRelease", &context->release_) ||
      !find_driver_function("cuDeviceGet", &get) || !find_driver_function("cuDevicePrimaryCtxRetain", &retain)) {
    return Error{ErrorCode::kUnsupported, "the CUDA driver is too old: it lacks functions of CUDA 12.0"};
  }
  CUresult result = get(&context->device_, ordinal);
  if (result == CUDA_SUCCESS) result = retain(&context->context_, context->device_);
  if (result != CUDA_SUCCESS) {
    return Error{ErrorCode::kDevice, "cuDevicePrimaryCtxRetain of CUDA device " + std::to_string(ordinal) + ": error " +
                                         std::to_string(static_cast<int>(result))};
  }
  return context;
}

Context::~Context() {
  if (context_ != nullptr) release_(device_);
}

ContextScope::ContextScope(const Context& context)
    : context_(context), ok_(context.push_(context.context_) == CUDA_SUCCESS) {
  if (ok_) (void)cudaThreadExchangeStreamCaptureMode(&capture_mode_);
}

ContextScope::~ContextScope() {
  if (!ok_) return;
  (void)cudaThreadExchangeStreamCaptureMode(&capture_mode_);
  CUcontext popped = nullptr;
  context_.pop_(&popped);
}

Status ContextScope::status() const {
  if (ok_) return {};
  return Error{ErrorCode::kDevice, "cuCtxPushCurrent: the CUDA context is gone"};
}

Event::~Event() {
  if (event_ == nullptr) return;
  ContextScope scope(*context_);
  if (scope.ok()) (void)cudaEventDestroy(event_);
}

Status Event::record(cudaStream_t stream) {
  if (event_ == nullptr) {
    const unsigned flags = cudaEventBlockingSync | (timing_ == Timing::kOn ? 0U : cudaEventDisableTiming);
    Status made = checked(cudaEventCreateWithFlags(&event_, flags), "cudaEventCreateWithFlags");
    if (!made) return made;
  }
  return checked(cudaEventRecord(event_, stream), "cudaEventRecord");
}

Status Event::wait() const {
  if (event_ == nullptr) return {};
  return checked(cudaEventSynchronize(event_), "cudaEventSynchronize");
}

Result<Nanos> Event::since(const Event& earlier) const {
  float milliseconds = 0;
  Status status = checked(cudaEventElapsedTime(&milliseconds, earlier.event_, event_), "cudaEventElapsedTime");
  if (!status) return status.error();
  return static_cast<Nanos>(static_cast<double>(milliseconds) * kMillisecond);
}

Status Event::order(cudaStream_t stream) const {
  if (event_ == nullptr) return {};
  return checked(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
}

Result<std::unique_ptr<Stream>> Stream::create(std::shared_ptr<Context> context) {
  return create(std::move(context), 0);
}

Result<std::unique_ptr<Stream>> Stream::create_urgent(std::shared_ptr<Context> context) {
  int least = 0;
  int greatest = 0;
  Status status = checked(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  if (!status) return status.error();
  return create(std::move(context), greatest);
}

Result<std::unique_ptr<Stream>> Stream::create(std::shared_ptr<Context> context, int priority) {
  std::unique_ptr<Stream> stream(new Stream(std::move(context)));
  Status made = checked(cudaStreamCreateWithPriority(&stream->stream_, cudaStreamNonBlocking, priority),
                        "cudaStreamCreateWithPriority");
  if (!made) return made.error();
  return Result<std::unique_ptr<Stream>>(std::move(stream));
}

Stream::~Stream() {
  if (stream_ == nullptr) return;
  ContextScope scope(*context_);
  if (scope.ok()) (void)cudaStreamDestroy(stream_);
}

}  // namespace flexkv::device
