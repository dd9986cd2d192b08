// SPDX-License-Identifier: Apache-2.0
// What cuda/launch.cuh asks of the CUDA runtime, on any machine: the runtime is what stands here, and prints how it is
// called. Compiled with -cudart none.
#include "cuda/launch.cuh"

#ifndef __CUDA_ARCH__
#include <cstdio>

static int ptx_version = 0, allowed = 48 * 1024;  // by the module's code; of shared memory

extern "C" {
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }

cudaError_t cudaGetDevice(int* device) { return *device = 1, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "refused"; }
cudaError_t cudaFuncGetName(const char** name, const void*) { return *name = "kernel", cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 99 * 1024 : 9;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = ptx_version, attributes->binaryVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  if (value > 99 * 1024) return cudaErrorInvalidValue;
  return allowed = value, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return std::printf("launched, up to %d KB\n", allowed / 1024), cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  return std::printf("launched early\n"), cudaSuccess;
}
}

static void kernel() {}

int main(int, char** words) {
  using namespace torch_kernels;
  ptx_version = std::atoi(words[1]);
  launch_early(kernel, 1, dim3(32), 0, nullptr);
  for (int kilobytes : {90, 60, 100}) try {
      launch(kernel, 1, dim3(32), size_t(kilobytes) << 10, nullptr);
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
    }
}
#endif
