// Loading of the CUDA library; its work is tested by cuda/cuda_device_test.cu on a machine with a GPU.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "flexkv/device/cuda_device.h"

namespace flexkv::device {
namespace {

class CudaLibrary : public testing::Test {
 protected:
  ~CudaLibrary() override {
    if (built_.empty()) {
      unsetenv("FLEXKV_CUDA_LIBRARY");
    } else {
      setenv("FLEXKV_CUDA_LIBRARY", built_.c_str(), 1);
    }
  }

  static std::string error_with(const char* library) {
    setenv("FLEXKV_CUDA_LIBRARY", library, 1);
    const auto device = open_cuda_device(0);
    return device ? "" : device.error().message;
  }

  const std::string built_ = std::getenv("FLEXKV_CUDA_LIBRARY") != nullptr ? std::getenv("FLEXKV_CUDA_LIBRARY") : "";
};

TEST_F(CudaLibrary, says_what_is_missing_and_how_to_build_it) {
  const std::string message = error_with("/nowhere/libflexkv_cuda.so");
  EXPECT_NE(message.find("/nowhere/libflexkv_cuda.so"), std::string::npos) << message;
  EXPECT_NE(message.find("-DFLEXKV_CUDA=ON"), std::string::npos) << message;
}

TEST_F(CudaLibrary, tells_a_library_of_another_build) {
  const std::string message = error_with("libm.so.6");
  EXPECT_NE(message.find("another build"), std::string::npos) << message;
}

TEST_F(CudaLibrary, loads_and_answers_without_a_gpu_too) {
  if (built_.empty()) GTEST_SKIP() << "FLEXKV_CUDA_LIBRARY is not set: the CUDA library was not built";
  const auto device = open_cuda_device(0);
  if (device) {
    EXPECT_NE(device.value()->name().find("CUDA device 0"), std::string::npos);
  } else {
    EXPECT_EQ(device.error().code, ErrorCode::kDevice) << device.error().message;
    EXPECT_NE(device.error().message.find("cudaGetDeviceCount"), std::string::npos) << device.error().message;
  }
}

}  // namespace
}  // namespace flexkv::device
