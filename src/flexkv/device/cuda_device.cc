#include "flexkv/device/cuda_device.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>

#include "flexkv/device/cuda_abi.h"

namespace flexkv::device {
namespace {

constexpr const char* kLibrary = "libflexkv_cuda.so";
constexpr const char* kHowToBuild = ". Build it with cmake -DFLEXKV_CUDA=ON (needs nvcc)";

std::string library_path() {
  if (const char* named = std::getenv("FLEXKV_CUDA_LIBRARY"); named != nullptr && *named != '\0') return named;
  Dl_info self{};
  if (dladdr(reinterpret_cast<const void*>(&open_cuda_device), &self) == 0 || self.dli_fname == nullptr)
    return kLibrary;
  const std::string path = self.dli_fname;
  const std::size_t slash = path.rfind('/');
  return (slash == std::string::npos ? "./" : path.substr(0, slash + 1)) + kLibrary;
}

}  // namespace

Result<std::shared_ptr<Device>> open_cuda_device(int ordinal, std::uint32_t stage_below) {
  const std::string path = library_path();
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    return Error{ErrorCode::kUnsupported, "cannot load the CUDA library of FlexKV: " +
                                              std::string(why != nullptr ? why : path.c_str()) + kHowToBuild};
  }
  const auto open = reinterpret_cast<CudaOpen>(dlsym(library, kCudaOpenName));
  std::shared_ptr<Device> device;
  Error error;
  const CudaOpened opened =
      open == nullptr ? CudaOpened::kOtherAbi : open(kCudaAbi, ordinal, stage_below, &device, &error);
  if (opened == CudaOpened::kOk) return device;
  if (opened == CudaOpened::kFailed) return error;
  return Error{ErrorCode::kUnsupported, path + " belongs to another build of FlexKV" + kHowToBuild};
}

}  // namespace flexkv::device
