// SPDX-License-Identifier: Apache-2.0
//
// launch(kernel, grid, block, shared_bytes, stream, args...) starts a kernel or throws std::runtime_error that names
// it; launch_early lets it overlap the kernel before it. DeviceGuard makes a tensor's device current for a scope. g++
// gets all from the emulator.
#pragma once
#include <concepts>
#include <source_location>
#include <tuple>
#include <utility>

#include "ptx.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <cxxabi.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#else
#include "../emulator/machine.h"
#endif

namespace torch_kernels {

// A dim3 that remembers the line it was written on, for messages. Made from a dim3 or an integer.
struct Grid : dim3 {
  Grid(dim3 size, std::source_location site = std::source_location::current()) : dim3(size), site(site) {}
  template <std::integral I>
  Grid(I x, std::source_location site = std::source_location::current()) : dim3(unsigned(x)), site(site) {}
  std::source_location site;
};

#ifdef __CUDACC__

inline std::string kernel_name(const void* kernel, const Grid& grid) {
#if CUDART_VERSION >= 12030
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) == cudaSuccess && mangled) {
    std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr), std::free);
    return name ? name.get() : mangled;
  }
#endif
  // Without a driver, or without an image for the device, the runtime does not tell.
  std::string file = grid.site.file_name();
  return "the kernel at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(grid.site.line());
}

[[noreturn]] inline void throw_cuda_error(cudaError_t error, const std::string& what) {
  cudaGetLastError();  // an error that was reported must not surface again in someone else's call
  std::string text = what + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    text += ". The device is sm_" + std::to_string(major * 10 + minor) + "; this build has";
#ifdef __CUDA_ARCH_LIST__
    for (int architecture : {__CUDA_ARCH_LIST__}) text += " sm_" + std::to_string(architecture / 10);
#else
    text += " no kernels for it";
#endif
  }
  throw std::runtime_error(text);
}

// Whether the code that runs on the current device waits where ptx::wait_for_previous_kernel() stands. What a driver
// makes of PTX for older architectures does not, whatever the device can do. The same for all kernels of the module.
inline bool waits_for_previous_kernel(const void* function) {
  enum { kUnknown, kNo, kYes };
  static std::atomic<char> known[64];  // by device
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= int(std::size(known))) return false;
  if (known[device] == kUnknown) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, function) != cudaSuccess) return false;  // the launch will say why
    known[device] = attributes.ptxVersion >= 90 ? kYes : kNo;
  }
  return known[device] == kYes;
}

// early: whether blocks may be set up while the stream's previous kernel still runs.
inline cudaError_t start_kernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                                void* stream, bool early) {
  if (!early || !waits_for_previous_kernel(function))
    return cudaLaunchKernel(function, grid, block, arguments, shared_bytes, static_cast<cudaStream_t>(stream));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream), config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelExC(&config, function, arguments);
}

// The most shared memory a block may ask for.
inline size_t shared_memory_limit(int device) {
  int bytes = 0;
  cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess)
    throw_cuda_error(error, "asking for the shared memory of CUDA device " + std::to_string(device));
  return size_t(bytes);
}

// Lets a kernel be launched on the current device with so much dynamic shared memory. It asks for all that there is: a
// smaller number would stop what another thread launches with more of it.
inline cudaError_t allow_shared_memory(const void* function, size_t bytes) {
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  size_t most = std::max(bytes, shared_memory_limit(device));
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most));
}

template <class... Parameters, class... Arguments>
void launch_kernel(bool early, void (*kernel)(Parameters...), const Grid& grid, dim3 block, size_t shared_bytes,
                   void* stream, Arguments&&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {
    cudaError_t error = allow_shared_memory(function, shared_bytes);
    if (error != cudaSuccess)
      throw_cuda_error(error, "asking for " + std::to_string(shared_bytes) + " bytes of shared memory for " +
                                  kernel_name(function, grid));
  }
  std::tuple<std::remove_cv_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  cudaError_t error = std::apply(
      [&](auto&... value) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(std::addressof(value)))..., nullptr};
        return start_kernel(function, static_cast<dim3>(grid), block, pointers, shared_bytes, stream, early);
      },
      values);
  if (error != cudaSuccess) throw_cuda_error(error, "launching " + kernel_name(function, grid));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaError_t error = cudaGetDevice(&previous_);
    if (error == cudaSuccess && device != previous_) error = cudaSetDevice(device);
    if (error != cudaSuccess) throw_cuda_error(error, "switching to CUDA device " + std::to_string(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

#else

template <class... Parameters, class... Arguments>
void launch_kernel(bool early, void (*kernel)(Parameters...), const Grid& grid, dim3 block, size_t shared_bytes,
                   void* /*stream*/, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  std::tuple<std::remove_cv_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  emulator::submit(early, [=] {
    auto body = [&] { std::apply(kernel, values); };
    emulator::run_grid(
        reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
        [](void* closure) { (*static_cast<decltype(body)*>(closure))(); }, &body, grid.site);
  });
}

inline size_t shared_memory_limit(int) { return emulator::settings.shared_limit; }

// An op's launches have run when it ends.
class DeviceGuard {
 public:
  explicit DeviceGuard(int) { emulator::postponing = true; }
  ~DeviceGuard() noexcept(false) {
    struct Ready {  // for the next op, whatever happens in this one
      ~Ready() { emulator::postponing = false, emulator::pending.clear(); }
    } ready;
    if (std::uncaught_exceptions() == exceptions_) emulator::run_pending();
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  const int exceptions_ = std::uncaught_exceptions();
};

#endif

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, void* stream,
            Arguments&&... arguments) {
  launch_kernel(false, kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

// For a kernel that calls ptx::wait_for_previous_kernel() before it writes global memory or reads what the stream's
// previous kernel may have written: on sm_90 and later it starts when all blocks of that kernel have called
// ptx::let_next_kernel_start() or ended.
template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, void* stream,
                  Arguments&&... arguments) {
  launch_kernel(true, kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace torch_kernels
