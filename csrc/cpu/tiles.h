// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// Key tiles and their products: what every kernel that reads keys is made of.
// Included by kernels.inc.h inside the namespace of an instruction set.

// Memory that a thread keeps from call to call, since fresh pages cost more than the arithmetic.
template <int Purpose>
float* scratch(int64_t count) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

enum { kQueries, kLogits, kSums, kTileA, kTileB, kProduct, kVectors, kStaging };

// kTile keys, dimension by dimension: element (k, t) is data[k * stride + t].
struct Tile {
  const float* data;
  int64_t stride;
};

template <class T>
GKV_INLINE const T* tile_keys(const LiveKeys& live, int64_t head, int64_t token) {
  const int64_t block_size = live.cache.block_size;
  return live.cache.keys<const T>(live.block_ids[token / block_size], head) + token % block_size;
}

// The tile that starts at `token` of the live tokens, in float32. Tokens behind the last live one
// are whatever the cache holds. float32 caches are read in place, others converted into `buffer`.
template <class T>
GKV_INLINE Tile load_tile(const LiveKeys& live, int64_t head, int64_t token, float* buffer) {
  const T* keys = tile_keys<T>(live, head, token);
  const int64_t depth = live.cache.head_dim, stride = live.cache.block_size;
  if constexpr (std::is_same_v<T, float>) {
    return {keys, stride};
  } else {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t t = 0; t < kTile; t += kLanes)
        store(buffer + k * kTile + t, load(keys + k * stride + t));
    return {buffer, kTile};
  }
}

// The cache lines of a tile that comes next, asked for one by one between products, so that memory
// and arithmetic overlap: blocks lie anywhere, and asking for all at once would wait for them.
struct Ahead {
  const char* first = nullptr;
  int64_t row_bytes = 0;  // from one dimension's keys to the next
  int64_t lines = 0;      // per dimension
};

template <class T>
GKV_INLINE Ahead tile_ahead(const LiveKeys& live, int64_t head, int64_t token) {
  if (token >= live.tokens) return {};
  return {reinterpret_cast<const char*>(tile_keys<T>(live, head, token)),
          live.cache.block_size * static_cast<int64_t>(sizeof(T)),
          (kTile * static_cast<int64_t>(sizeof(T)) + 63) / 64};
}

// As load_tile, with 0 for the tokens behind the last live one.
template <class T>
GKV_INLINE Tile load_clean_tile(const LiveKeys& live, int64_t head, int64_t token, float* buffer) {
  const int64_t valid = live.tokens - token;
  if (valid >= kTile) return load_tile<T>(live, head, token, buffer);
  const T* keys = tile_keys<T>(live, head, token);
  for (int64_t k = 0; k < live.cache.head_dim; ++k)
    for (int64_t t = 0; t < kTile; ++t)
      buffer[k * kTile + t] = t < valid ? to_float(keys[k * live.cache.block_size + t]) : 0.0f;
  return {buffer, kTile};
}

#if GKV_VECTOR_BYTES == 64
constexpr int kRows = 12;  // 24 of 32 registers accumulate
#else
constexpr int kRows = 6;  // 12 of 16
#endif
constexpr int kColumns = 2 * kLanes;

// c[r][t] = sum over k of a[k][r] * b[k][t], for `Rows` rows and kColumns columns.
template <int Rows>
GKV_INLINE void micro_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                              int64_t depth, float* c, int64_t c_stride, const char* ahead,
                              int64_t ahead_stride) {
  Floats left[Rows], right[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) left[r] = right[r] = Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(ahead + k * ahead_stride);
    const Floats b0 = load(b + k * b_stride), b1 = load(b + k * b_stride + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Floats x = broadcast(a[k * a_stride + r]);
      left[r] += x * b0;
      right[r] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    store(c + r * c_stride, left[r]);
    store(c + r * c_stride + kLanes, right[r]);
  }
}

template <int Rows, class... Arguments>
GKV_INLINE void row_products(int64_t rows, Arguments... arguments) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      micro_product<Rows>(arguments...);
    else
      row_products<Rows - 1>(rows, arguments...);
  }
}

// c [rows, kTile] = a^T b: a is [depth, rows] (element (k, r) at a[k * a_stride + r]), b a tile.
inline void tile_product(const float* a, int64_t a_stride, int64_t rows, Tile b, int64_t depth,
                         float* c, int64_t c_stride, Ahead ahead = {}) {
  const int64_t passes = (rows + kRows - 1) / kRows, each = (rows + passes - 1) / passes;
  int64_t line = 0;
  for (int64_t t = 0; t < kTile; t += kColumns)
    for (int64_t r = 0; r < rows; r += each, ++line) {
      const bool asks = line < ahead.lines;  // otherwise for what is there already
      row_products<kRows>(std::min(each, rows - r), a + r, a_stride, b.data + t, b.stride, depth,
                          c + r * c_stride + t, c_stride,
                          asks ? ahead.first + 64 * line : reinterpret_cast<const char*>(a),
                          asks ? ahead.row_bytes : 0);
    }
}

// ---- rows of logits

GKV_INLINE int64_t whole_tiles(int64_t tokens) { return (tokens + kTile - 1) / kTile * kTile; }

// logits [rows, whole_tiles(tokens)] of all live keys of a head; queries [head_dim, rows], scaled.
template <class T>
void all_logits(const LiveKeys& live, int64_t head, const float* queries, int64_t rows,
                float* logits) {
  const int64_t width = whole_tiles(live.tokens), depth = live.cache.head_dim;
  float* buffer = scratch<kTileB>(depth * kTile);
  for (int64_t token = 0; token < live.tokens; token += kTile) {
    const Tile tile = load_tile<T>(live, head, token, buffer);
    tile_product(queries, rows, rows, tile, depth, logits + token, width,
                 tile_ahead<T>(live, head, token + kTile));
  }
}

// What is behind `length` in a row of logits gets no attention; up to the end of the last vector.
GKV_INLINE void close_row(float* row, int64_t length) {
  for (int64_t t = length; t % kLanes; ++t) row[t] = -std::numeric_limits<float>::infinity();
}

GKV_INLINE void cap(float* row, int64_t length, float softcap) {
  if (softcap == 0.0f) return;
  const float inverse = 1.0f / softcap;
  for (int64_t t = 0; t < length; t += kLanes)
    store(row + t, hyperbolic_tangent(load(row + t) * inverse) * softcap);
}

// Turn the first `length` logits of a row into exponentials; returns what normalises them.
GKV_INLINE float exponentials(float* row, int64_t length) {
  close_row(row, length);
  Floats most = load(row), other = most;
  int64_t t = kLanes;
  for (; t + kLanes < length; t += 2 * kLanes) {
    most = maximum(most, load(row + t));
    other = maximum(other, load(row + t + kLanes));
  }
  if (t < length) most = maximum(most, load(row + t));
  const Floats shift = broadcast(largest(maximum(most, other)));
  Floats total{};
  for (t = 0; t < length; t += kLanes) {
    const Floats e = exponential(load(row + t) - shift);
    store(row + t, e);
    total += e;
  }
  return 1.0f / sum(total);
}
