// SPDX-License-Identifier: Apache-2.0
// Errors are exceptions: std::invalid_argument becomes Python's ValueError, std::runtime_error its RuntimeError.
//
// Messages are made without C++ streams. These need locales, whose identities are unique in a process: a module that
// was linked with its own libstdc++ crashes in them once torch has loaded another.
#pragma once
#include <stdexcept>
#include <string>

namespace torch_kernels {

inline std::string text(const char* part) { return part; }
inline std::string text(const std::string& part) { return part; }
inline std::string text(bool part) { return part ? "true" : "false"; }
inline std::string text(auto number) { return std::to_string(number); }

template <class... Parts>
std::string concatenate(const Parts&... parts) {
  return (std::string() + ... + text(parts));
}

template <class... Parts>
void require(bool condition, const Parts&... message) {
  if (!condition) throw std::invalid_argument(concatenate(message...));
}

}  // namespace torch_kernels
