// SPDX-License-Identifier: Apache-2.0
//
// The emulator's half of cuda/launch.cuh.
#pragma once
#include <concepts>
#include <tuple>
#include <utility>

#include "machine.h"

namespace torch_kernels {

// A dim3 that remembers the line it was written on.
struct Grid : dim3 {
  Grid(dim3 size, emulator::Site site = emulator::Site::current()) : dim3(size), site(site) {}
  template <std::integral I>
  Grid(I x, emulator::Site site = emulator::Site::current()) : dim3(unsigned(x)), site(site) {}
  emulator::Site site;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, void* /*stream*/,
            Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  std::tuple<std::remove_cv_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  auto body = [&] { std::apply(kernel, values); };
  emulator::run_grid(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                     [](void* closure) { (*static_cast<decltype(body)*>(closure))(); }, &body, grid.site);
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

}  // namespace torch_kernels
