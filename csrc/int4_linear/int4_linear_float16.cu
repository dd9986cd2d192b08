// SPDX-License-Identifier: Apache-2.0
#include "int4_linear/int4_linear.cuh"

namespace torch_kernels {

template void launch_int4_linear<__half>(const Int4LinearWork&, void*);

}  // namespace torch_kernels
