// What requests and answers weigh on a connection to Redis (RESP 2), for simulations that carry no bytes.
#pragma once

#include <cstdint>

#include "flexkv/meta/request.h"

namespace flexkv::testing {

// As RedisChannel would send it.
std::uint64_t request_bytes(const meta::Request& request);
std::uint64_t answer_bytes(const meta::Request& request, const meta::Answers& answers);

}  // namespace flexkv::testing
