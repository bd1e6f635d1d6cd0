#include "machine.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <stdexcept>

#include "flexkv/device/cuda_device.h"
#include "flexkv/file/uring_engine.h"
#include "flexkv/memory/host_region.h"

namespace flexkv::bind {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

constexpr std::uint32_t kTrialSlots = 64;

std::pair<bool, std::string> io_uring() {
  const auto engine = file::make_uring_engine();
  if (const Status started = engine->start(kTrialSlots); !started) return {false, started.error().message};
  std::string description = engine->describe();
  engine->stop();
  return {true, std::move(description)};
}

std::string trial_pool(std::uint64_t bytes, bool huge_pages) {
  const auto region = memory::HostRegion::create(bytes, {.huge_pages = huge_pages});
  if (!region) throw std::runtime_error(region.error().message);
  return region.value().description();
}

std::string cuda_device(int ordinal) {
  const auto opened = device::open_cuda_device(ordinal);
  if (!opened) throw std::runtime_error(opened.error().message);
  return std::string(opened.value()->name());
}

}  // namespace

void bind_machine(nb::module_& m) {
  const nb::call_guard<nb::gil_scoped_release> without_gil;
  m.def("io_uring", &io_uring, without_gil,
        "Whether drives are read and written by io_uring here, and in what form, or why not.");
  m.def("trial_pool", &trial_pool, "bytes"_a, "huge_pages"_a, without_gil,
        "Takes a host pool of that size, gives it back, and tells what pages it had. RuntimeError when refused.");
  m.def("cuda_device", &cuda_device, "ordinal"_a, without_gil,
        "Opens a GPU through the CUDA library and tells its name. RuntimeError when that cannot be.");
}

}  // namespace flexkv::bind
