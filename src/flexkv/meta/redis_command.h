// Operations as the commands that Redis (5.0 or later) takes. Pure functions. Thread-safe.
#pragma once

#include <string>
#include <vector>

#include "flexkv/meta/request.h"

namespace flexkv::meta {

std::vector<std::string> words_of(const Op& op);
// As it goes over the connection.
void append_command(const std::vector<std::string>& words, std::string& out);

}  // namespace flexkv::meta
