// SPDX-License-Identifier: Apache-2.0
// Errors are exceptions: std::invalid_argument becomes Python's ValueError, std::runtime_error its RuntimeError.
#pragma once
#include <sstream>
#include <stdexcept>

namespace torch_kernels {

template <class... Parts>
std::string concatenate(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
void require(bool condition, const Parts&... message) {
  if (!condition) throw std::invalid_argument(concatenate(message...));
}

}  // namespace torch_kernels
