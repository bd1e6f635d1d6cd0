// I/O by threads with plain system calls, one for each I/O that may be in flight: where io_uring is missing or
// forbidden.
#pragma once

#include "flexkv/file/io_engine.h"

namespace flexkv::file {

// `why`: for describe().
std::unique_ptr<IoEngine> make_thread_engine(std::string why = {});

}  // namespace flexkv::file
