// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// What every step needs before attention runs: live tables without holes and the places of queries
// in the rings (oracles: ops/live_table.py: squeeze, worker/rings.py: RingIndex), and the copy of a
// token's queries to its place.
#pragma once

#include "block.h"

namespace gkv::cuda {

struct Step {
  const int32_t* block_table;  // 0 is the null block: a hole
  const int32_t* seq_lens;
  const int32_t* query_starts;
  const int32_t* slots;
  int32_t* live_table;
  int32_t* live_lens;
  int32_t* places;
  int64_t table_stride, live_stride;
  int32_t rows, width, capacity;
  int32_t block_size, window;
};

struct StepShared {
  int32_t counts[2][kThreads];
};

struct StepOwn {
  int32_t live;  // entries of the thread's part of the row
};

// One block per row. Each thread owns a run of entries: it counts the live ones, learns how many
// there are before it, and copies them there.
template <class Block>
GKV_BOTH void squeeze_row(const Step& x, int32_t row, Block& block) {
  const int32_t* table = x.block_table + row * x.table_stride;
  int32_t* live_table = x.live_table + row * x.live_stride;
  const int32_t length = x.seq_lens[row];
  // Not beyond the table, whatever a padding row says.
  int32_t used = length > 0 ? (length - 1) / x.block_size + 1 : 0;
  used = used < x.width ? used : x.width;
  const int32_t run = (used + kThreads - 1) / kThreads;
  block.each([&](int thread, StepOwn& own) {
    own.live = 0;
    for (int32_t i = thread * run; i < (thread + 1) * run && i < used; ++i)
      own.live += table[i] != 0;
    block.shared.counts[0][thread] = own.live;
  });
  int now = 0;
  for (int distance = 1; distance < kThreads; distance *= 2, now ^= 1) {
    block.each([&](int thread, StepOwn&) {
      const int32_t before = thread < distance ? 0 : block.shared.counts[now][thread - distance];
      block.shared.counts[now ^ 1][thread] = block.shared.counts[now][thread] + before;
    });
  }
  block.each([&](int thread, StepOwn& own) {
    const int32_t total = block.shared.counts[now][kThreads - 1];
    int32_t place = block.shared.counts[now][thread] - own.live;
    for (int32_t i = thread * run; i < (thread + 1) * run && i < used; ++i)
      if (table[i] != 0) live_table[place++] = table[i];
    for (int32_t i = total + thread; i < used; i += kThreads) live_table[i] = 0;
    if (thread == 0) x.live_lens[row] = length - (used - total) * x.block_size;
  });
}

// Position p of a recorded request goes to slot * window + p mod window, the last `window` ones
// only.
template <class Block>
GKV_BOTH void place_row(const Step& x, int32_t row, Block& block) {
  const int32_t start = x.query_starts[row];
  const int32_t tokens = x.query_starts[row + 1] - start;
  const int32_t first = x.seq_lens[row] - tokens, slot = x.slots[row];
  block.each([&](int thread, StepOwn&) {
    for (int32_t i = thread; i < tokens && start + i < x.capacity; i += kThreads) {
      const bool recorded = slot >= 0 && i >= tokens - x.window;
      x.places[start + i] = recorded ? slot * x.window + (first + i) % x.window : -1;
    }
  });
}

template <class Block>
GKV_BOTH void prepare(const Step& x, int32_t index, int32_t blocks, Block& block) {
  if (index < x.rows) {
    squeeze_row(x, index, block);
    place_row(x, index, block);
  }
  const int64_t end = x.query_starts[x.rows];
  block.each([&](int thread, StepOwn&) {
    const int64_t step = static_cast<int64_t>(blocks) * kThreads;
    for (int64_t i = end + index * kThreads + thread; i < x.capacity; i += step) x.places[i] = -1;
  });
}

struct WindowQueries {
  const char* queries;
  const int32_t* places;
  char* ring;
  int64_t query_stride;  // bytes from token to token
  int32_t tokens, row_bytes;
};

template <class Vec>
GKV_BOTH void store_queries(const WindowQueries& x, int32_t token, int thread) {
  const int32_t place = x.places[token];
  if (place < 0) return;
  const auto* from = reinterpret_cast<const Vec*>(x.queries + token * x.query_stride);
  auto* to = reinterpret_cast<Vec*>(x.ring + static_cast<int64_t>(place) * x.row_bytes);
  const int32_t vectors = x.row_bytes / static_cast<int32_t>(sizeof(Vec));
  for (int32_t i = thread; i < vectors; i += kThreads) to[i] = from[i];
}

}  // namespace gkv::cuda
