// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// What a kernel is written in: a block of threads that run phase by phase. On the device a phase
// ends in a barrier; on the host (tests/csrc) the threads of a phase run one after the other, in
// any order, so that a race between them shows. No CUDA header is needed here.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GKV_BOTH __host__ __device__ __forceinline__
#define GKV_UNROLLED _Pragma("unroll")
#define GKV_ROLLED _Pragma("unroll 1")
#else
#define GKV_BOTH inline
#define GKV_UNROLLED
#define GKV_ROLLED
#endif

namespace gkv::cuda {

constexpr int kThreads = 256;  // of every block

// The widest access of a thread, and the narrowest that rows of any element type consist of.
struct alignas(16) Vec16 {
  uint32_t x, y, z, w;
};
using Vec4 = uint32_t;

#if defined(__CUDACC__)
template <class Shared, class Own>
struct DeviceBlock {
  Shared& shared;
  Own own{};  // what a thread keeps in registers between phases

  template <class Phase>
  __device__ __forceinline__ void each(Phase phase) {
    phase(static_cast<int>(threadIdx.x), own);
    __syncthreads();
  }
};
#endif

// Lower a number in shared memory to the least that a thread of the block has. All threads call it.
GKV_BOTH void lower(int32_t& place, int32_t mine) {
#if defined(__CUDA_ARCH__)
  mine = __reduce_min_sync(~0u, mine);
  if (threadIdx.x % 32 == 0) atomicMin(&place, mine);
#else
  if (mine < place) place = mine;
#endif
}

GKV_BOTH void raise(int32_t& place, int32_t mine) {
#if defined(__CUDA_ARCH__)
  mine = __reduce_max_sync(~0u, mine);
  if (threadIdx.x % 32 == 0) atomicMax(&place, mine);
#else
  if (mine > place) place = mine;
#endif
}

}  // namespace gkv::cuda
