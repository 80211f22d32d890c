// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// What the kernels take, and the table of them that each instruction set fills in. Plain C++: no
// torch, no threads. A kernel does the tasks [begin, end) that it is given, in any order.
#pragma once

#include <cstdint>

namespace gkv {

enum DType : int { kFloat32, kBFloat16, kFloat16, kNumDTypes };

// Keys are read and cosines compared in tiles of so many tokens; a block holds whole tiles.
constexpr int64_t kTile = 32;

// One layer's cache: of each block and head the keys [head_dim, block_size], then the values
// [block_size, head_dim].
struct PagedCache {
  char* data;
  int64_t itemsize;
  int64_t block_stride;  // elements
  int64_t kv_heads;
  int64_t block_size;
  int64_t head_dim;

  template <class T>
  T* keys(int64_t block, int64_t head) const {
    return reinterpret_cast<T*>(data) + block * block_stride + head * 2 * block_size * head_dim;
  }
  template <class T>
  T* values(int64_t block, int64_t head) const {
    return keys<T>(block, head) + block_size * head_dim;
  }
};

// The live tokens of one request: its blocks in logical order.
struct LiveKeys {
  PagedCache cache;
  const int64_t* block_ids;
  int64_t tokens;
};

enum class Form { kMaxProbability, kMaxLogit, kMeanProbability };

struct LocalScores {
  LiveKeys keys;
  const char* queries;  // [query_heads, window, head_dim] of the cache's type
  int64_t head_stride;  // elements
  int64_t query_stride;
  int64_t group;  // query heads per KV head
  int64_t window;
  float scale;
  float softcap;  // 0: none
  Form form;

  int64_t older() const { return keys.tokens - window; }
  // The window is worked off in chunks, so that the logits of one fit the second-level cache. Fixed
  // by the shapes alone: the sums do not depend on the number of threads.
  int64_t chunk() const {
    const int64_t fits = (int64_t{2} << 20) / (4 * keys.tokens);
    const int64_t rows = fits < 64 ? fits : 64;
    const int64_t queries = rows / group;
    return queries < 1 ? 1 : queries < window ? queries : window;
  }
  int64_t num_chunks() const { return (window + chunk() - 1) / chunk(); }
};

struct Redundancy {
  LiveKeys keys;
  int64_t start;  // first token that takes part, a multiple of the block size
  float threshold;
  bool within_blocks;
  float* out;  // [kv_heads, tokens - start]
};

struct Superseded {
  LiveKeys keys;
  int64_t start;  // first token that takes part, a multiple of the block size
  float* out;     // [kv_heads, tokens - start]
};

struct KeyNorms {
  LiveKeys keys;
  float* out;  // [kv_heads, tokens]
};

struct Compact {
  PagedCache cache;
  float* plane;  // [blocks, kv_heads, block_size], or null
  const int64_t* source_ids;
  int64_t num_sources;
  const int64_t* target_ids;
  int64_t num_targets;
  const int64_t* keep;  // [kv_heads or 1, num_targets * block_size], ascending
  int64_t keep_stride;  // 0 where all heads share one row
};

struct TopK {
  const float* scores;  // [rows, units]
  int64_t units;
  int64_t count;
  int64_t* keep;  // [rows, count]
};

struct BlockMax {
  const float* scores;  // [blocks, block_size]
  int64_t block_size;
  float* out;
};

struct AttentionMass {
  PagedCache cache;
  float* plane;         // [blocks, kv_heads, block_size]
  const char* queries;  // [tokens, query_heads, head_dim] of the cache's type
  int64_t token_stride;
  int64_t head_stride;
  int64_t group;
  const int32_t* live_table;  // [requests, table_stride]
  int64_t table_stride;
  const int32_t* live_lens;
  const int32_t* query_starts;
  const int32_t* protected_tokens;
  float scale;
  float softcap;
};

struct Kernels {
  const char* name;
  // Task: chunk * kv_heads + head. partial [chunks, kv_heads, older]: sums over the chunk's
  // queries.
  void (*local_scores[kNumDTypes])(const LocalScores&, float* partial, int64_t begin, int64_t end);
  // Task: head.
  void (*redundancy[kNumDTypes])(const Redundancy&, int64_t begin, int64_t end);
  void (*superseded[kNumDTypes])(const Superseded&, int64_t begin, int64_t end);
  void (*key_norms[kNumDTypes])(const KeyNorms&, int64_t begin, int64_t end);
  void (*compact)(const Compact&, int64_t begin, int64_t end);
  void (*topk_keep)(const TopK&, int64_t begin, int64_t end);
  void (*block_max)(const BlockMax&, int64_t begin, int64_t end);
  // Task: request * kv_heads + head.
  void (*attention_mass[kNumDTypes])(const AttentionMass&, int64_t begin, int64_t end);
};

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace gkv
