// I/O by io_uring: one ring, owned by the drive's lane. Needs Linux 5.11; what later kernels have is used where it is
// there (registered files and memory from 5.19, one issuer from 6.0, deferred completion work from 6.1).
#pragma once

#include "flexkv/file/io_engine.h"

namespace flexkv::file {

// start() fails with kUnsupported where the kernel has no usable io_uring, or it is forbidden (as in Docker's default
// profile).
std::unique_ptr<IoEngine> make_uring_engine();

}  // namespace flexkv::file
