// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// The kernels that run in every step: one block per row of the block table, and one per token.
#include "kernels.h"

namespace gkv::cuda {

extern "C" __global__ void __launch_bounds__(kThreads)
    gkv_prepare_step(const __grid_constant__ Step x) {
  __shared__ StepShared shared;
  DeviceBlock<StepShared, StepOwn> block{shared};
  prepare(x, blockIdx.x, gridDim.x, block);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    gkv_store_queries_wide(const __grid_constant__ WindowQueries x) {
  store_queries<Vec16>(x, blockIdx.x, threadIdx.x);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    gkv_store_queries_narrow(const __grid_constant__ WindowQueries x) {
  store_queries<Vec4>(x, blockIdx.x, threadIdx.x);
}

namespace {

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_prepare_step(const Step& x, void* stream) {
  // Without rows there still are places to clear.
  const int blocks = x.rows > 0 ? x.rows : 1;
  gkv_prepare_step<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(x);
  return last_error();
}

const char* launch_store_queries(const WindowQueries& x, bool wide, void* stream) {
  const auto kernel = wide ? gkv_store_queries_wide : gkv_store_queries_narrow;
  kernel<<<x.tokens, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(x);
  return last_error();
}

}  // namespace gkv::cuda
