// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// Runs the CUDA operators on the host: csrc/cuda/ops.cpp over launchers that run each kernel's own
// source block by block. Between two barriers the threads of a block run one after the other in an
// order drawn anew each time, and so do the blocks of a launch: what only one order makes right
// fails.
#include <algorithm>
#include <array>
#include <numeric>
#include <random>
#include <vector>

#include "kernels.h"

namespace {

std::mt19937 generator;

template <class Numbers>
void shuffle(Numbers& numbers) {
  std::iota(numbers.begin(), numbers.end(), 0);
  switch (generator() % 4) {
    case 0:
      return;
    case 1:
      return std::reverse(numbers.begin(), numbers.end());
    default:
      return std::shuffle(numbers.begin(), numbers.end(), generator);
  }
}

std::vector<int> shuffled(int64_t count) {
  std::vector<int> numbers(count);
  shuffle(numbers);
  return numbers;
}

template <class Shared, class Own>
struct HostBlock {
  Shared shared;
  std::array<Own, gkv::cuda::kThreads> own{};
  std::array<int, gkv::cuda::kThreads> order;

  template <class Phase>
  void each(Phase phase) {
    shuffle(order);
    for (const int thread : order) phase(thread, own[thread]);
  }
};

template <class Vec>
void compact_all(const gkv::cuda::Compact& x) {
  using namespace gkv::cuda;
  static HostBlock<CompactShared, CompactOwn<Vec>> block;
  const int parts = compact_shape<Vec>(x.row_bytes).parts;
  for (const int i : shuffled(static_cast<int64_t>(parts) * x.kv_heads * x.num_layers))
    compact<Vec>(x, i / parts / x.kv_heads, i / parts % x.kv_heads, i % parts, block);
}

template <class Vec>
void store_all(const gkv::cuda::WindowQueries& x) {
  for (const int token : shuffled(x.tokens))
    for (int thread = 0; thread < gkv::cuda::kThreads; ++thread)
      gkv::cuda::store_queries<Vec>(x, token, thread);
}

// What the last launches were, for the tests to ask.
int launches = 0, wide_launches = 0;

void count_launch(bool wide) {
  ++launches;
  wide_launches += wide;
}

}  // namespace

namespace gkv::cuda {

const char* launch_compact(const Compact& x, bool wide, void*) {
  count_launch(wide);
  wide ? compact_all<Vec16>(x) : compact_all<Vec4>(x);
  return nullptr;
}

const char* launch_prepare_step(const Step& x, void*) {
  count_launch(false);
  static HostBlock<StepShared, StepOwn> block;
  const int blocks = std::max(x.rows, 1);
  for (const int row : shuffled(blocks)) prepare(x, row, blocks, block);
  return nullptr;
}

const char* launch_store_queries(const WindowQueries& x, bool wide, void*) {
  count_launch(wide);
  wide ? store_all<Vec16>(x) : store_all<Vec4>(x);
  return nullptr;
}

}  // namespace gkv::cuda

extern "C" {

__attribute__((visibility("default"))) void emulated_seed(unsigned seed) { generator.seed(seed); }

// Launches since the last call, and how many of them read 16 bytes at a time.
__attribute__((visibility("default"))) void emulated_launches(int* all, int* wide) {
  *all = launches;
  *wide = wide_launches;
  launches = wide_launches = 0;
}

// What ops.cpp asks of libtorch_cuda.
int32_t aoti_torch_create_cuda_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_cuda_guard(void*) { return 0; }
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}
