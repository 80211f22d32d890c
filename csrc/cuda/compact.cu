// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// The kernels that move survivors: one block per part of a row, KV head and layer.
#include "kernels.h"

namespace gkv::cuda {
namespace {

// Of 36 layers of 8 heads, keys and values apart, all blocks fit at once: 576 on the 132
// multiprocessors of an H100, or on the 148 of a B200, whose compiler would spill with five.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksPerProcessor = 4;
#else
constexpr int kBlocksPerProcessor = 5;
#endif

template <class Vec>
__device__ __forceinline__ void run(const Compact& x) {
  __shared__ CompactShared shared;
  DeviceBlock<CompactShared, CompactOwn<Vec>> block{shared};
  compact<Vec>(x, blockIdx.z, blockIdx.y, blockIdx.x, block);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    gkv_compact_wide(const __grid_constant__ Compact x) {
  run<Vec16>(x);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    gkv_compact_narrow(const __grid_constant__ Compact x) {
  run<Vec4>(x);
}

const char* launch_compact(const Compact& x, bool wide, void* stream) {
  const CompactShape shape =
      wide ? compact_shape<Vec16>(x.row_bytes) : compact_shape<Vec4>(x.row_bytes);
  const dim3 grid(shape.parts, x.kv_heads, x.num_layers);
  const auto kernel = wide ? gkv_compact_wide : gkv_compact_narrow;
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(x);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gkv::cuda
