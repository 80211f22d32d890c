// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// Mean cosine similarities in which near-duplicates excuse the newest, the largest cosines to newer
// keys, and key norms; the oracles are ops/reference.py: redundancy, redundancy_in_block,
// superseded. Included by kernels.inc.h.
//
// With u the keys at unit length, the mean of row i is u_i . (sum of all u), less its own term,
// less the entries that columns lose in row i. The sum costs O(tokens). Of the matrix itself only
// this is wanted: for each column the last row above the threshold. Tiles of the triangle are
// computed from the newest row down, and only while one of the two tiles still looks: O(tokens)
// where keys resemble each other, as the keys of one head mostly do, and half the matrix where none
// resembles any other.

constexpr int64_t kVectorsPerTile = kTile / kLanes;

// Squared norms of the tile's tokens.
GKV_INLINE void squared_norms(Tile tile, int64_t depth, float* out) {
  Floats total[kVectorsPerTile] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t v = 0; v < kVectorsPerTile; ++v) {
      const Floats x = load(tile.data + k * tile.stride + v * kLanes);
      total[v] += x * x;
    }
  for (int64_t v = 0; v < kVectorsPerTile; ++v) store(out + v * kLanes, total[v]);
}

// 1 / |k| of the tile's tokens; |k| is at least 1e-12, as in torch's normalize.
GKV_INLINE void inverse_norms(Tile tile, int64_t depth, float* out) {
  squared_norms(tile, depth, out);
  for (int64_t t = 0; t < kTile; ++t) out[t] = 1.0f / std::max(std::sqrt(out[t]), 1e-12f);
}

// The search for each token's newest lookalike, kTile columns at a time.
struct Columns {
  uint32_t searching;  // one bit for each token that has found none yet
  uint32_t newest_above(const float* row_of_cosines, float threshold) const {
    uint32_t bits = 0;
    for (int64_t t = 0; t < kTile; t += kLanes)
      bits |= bits_greater(load(row_of_cosines + t), broadcast(threshold)) << t;
    return bits;
  }
};

// c[r][t] *= row[r] * column[t]: products into cosines. Returns whether any exceeds the threshold.
GKV_INLINE bool to_cosines(float* c, const float* row, const float* column, float threshold) {
  uint32_t any = 0;
  for (int64_t t = 0; t < kTile; t += kLanes) {
    const Floats scale = load(column + t);
    for (int64_t r = 0; r < kTile; ++r) {
      const Floats cosine = load(c + r * kTile + t) * row[r] * scale;
      store(c + r * kTile + t, cosine);
      any |= bits_greater(cosine, broadcast(threshold));
    }
  }
  return any;
}

// Columns [t] of the tile look at rows [r], newest first. lost[r]: what row r loses.
GKV_INLINE void search_columns(const float* c, int64_t rows, float threshold, Columns& columns,
                               float* lost) {
  for (int64_t r = rows - 1; r >= 0 && columns.searching; --r) {
    uint32_t found = columns.newest_above(c + r * kTile, threshold) & columns.searching;
    columns.searching &= ~found;
    for (; found; found &= found - 1) lost[r] += c[r * kTile + __builtin_ctz(found)];
  }
}

// The transposed search: the tokens of the rows [r] look at the columns [t], all older than they.
GKV_INLINE void search_rows(const float* c, int64_t rows, float threshold, Columns& searchers,
                            float* lost) {
  for (int64_t r = 0; r < rows; ++r) {
    if (!(searchers.searching >> r & 1)) continue;
    const uint32_t found = searchers.newest_above(c + r * kTile, threshold);
    if (!found) continue;
    const int newest = 31 - __builtin_clz(found);
    lost[newest] += c[r * kTile + newest];
    searchers.searching &= ~(uint32_t{1} << r);
  }
}

GKV_INLINE Columns all_of(int64_t tokens) {
  return {tokens >= kTile ? ~uint32_t{0} : (uint32_t{1} << tokens) - 1};
}

GKV_INLINE void exclude_diagonal(float* c) {
  for (int64_t t = 0; t < kTile; ++t) c[t * kTile + t] = -2.0f;  // below any threshold
}

// Among the live tokens [first, first + count): out [count], sums of each row times `share`.
template <class T>
void redundancy_among(const Redundancy& x, int64_t head, int64_t first, int64_t count, float share,
                      float* out) {
  const int64_t depth = x.keys.cache.head_dim;
  const int64_t tiles = (count + kTile - 1) / kTile;
  float* vectors = scratch<kVectors>(2 * tiles * kTile + depth * kLanes);
  float *inverse = vectors, *lost = vectors + tiles * kTile, *total = lost + tiles * kTile;
  float *a = scratch<kTileA>(depth * kTile), *b = scratch<kTileB>(depth * kTile);
  float* c = scratch<kProduct>(kTile * kTile);
  std::fill_n(lost, tiles * kTile + depth * kLanes, 0.0f);

  for (int64_t i = 0; i < tiles; ++i) {
    const Tile tile = load_clean_tile<T>(x.keys, head, first + i * kTile, a);
    inverse_norms(tile, depth, inverse + i * kTile);
    for (int64_t k = 0; k < depth; ++k) {
      Floats part = load(total + k * kLanes);
      for (int64_t t = 0; t < kTile; t += kLanes)
        part += load(tile.data + k * tile.stride + t) * load(inverse + i * kTile + t);
      store(total + k * kLanes, part);
    }
  }
  for (int64_t k = 0; k < depth; ++k) total[k] = sum(load(total + k * kLanes));

  std::vector<Columns> columns(tiles, all_of(kTile));
  columns.back() = all_of(count - (tiles - 1) * kTile);
  int64_t oldest = 0;  // tiles below have nothing left to find
  for (int64_t i = tiles - 1; i >= 0; --i) {
    const int64_t rows = std::min(kTile, count - i * kTile);
    Tile newer{};
    for (int64_t j = i; j >= 0; --j) {
      if (!columns[i].searching) {
        while (oldest <= j && !columns[oldest].searching) ++oldest;
        if (j < oldest) break;
      }
      if (!columns[i].searching && !columns[j].searching) continue;
      if (!newer.data) newer = load_clean_tile<T>(x.keys, head, first + i * kTile, a);
      const Tile older = i == j ? newer : load_clean_tile<T>(x.keys, head, first + j * kTile, b);
      tile_product(newer.data, newer.stride, kTile, older, depth, c, kTile);
      if (!to_cosines(c, inverse + i * kTile, inverse + j * kTile, x.threshold)) continue;
      if (i == j) exclude_diagonal(c);
      search_columns(c, rows, x.threshold, columns[j], lost + i * kTile);
      if (i != j) search_rows(c, rows, x.threshold, columns[i], lost + j * kTile);
    }
  }

  for (int64_t i = 0; i < tiles; ++i) {
    const Tile tile = load_clean_tile<T>(x.keys, head, first + i * kTile, a);
    Floats along[kVectorsPerTile] = {}, self[kVectorsPerTile] = {};
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t v = 0; v < kVectorsPerTile; ++v) {
        const Floats key = load(tile.data + k * tile.stride + v * kLanes);
        along[v] += key * total[k];
        self[v] += key * key;
      }
    float means[kTile];
    for (int64_t v = 0; v < kVectorsPerTile; ++v) {
      const Floats scale = load(inverse + i * kTile + v * kLanes);
      const Floats gone = load(lost + i * kTile + v * kLanes);
      store(means + v * kLanes, (along[v] * scale - self[v] * scale * scale - gone) * share);
    }
    std::copy_n(means, std::min(kTile, count - i * kTile), out + i * kTile);
  }
}

template <class T>
void redundancy(const Redundancy& x, int64_t begin, int64_t end) {
  const int64_t all = x.keys.tokens - x.start;
  // A block that is not full is divided by the block size all the same.
  const int64_t step = x.within_blocks ? x.keys.cache.block_size : all;
  const float share = 1.0f / static_cast<float>(step);
  for (int64_t head = begin; head < end; ++head)
    for (int64_t done = 0; done < all; done += step)
      redundancy_among<T>(x, head, x.start + done, std::min(step, all - done), share,
                          x.out + head * all + done);
}

// best[t] = max(best[t], c[r][t] * row[r]) over all rows.
GKV_INLINE void largest_of_columns(const float* c, const float* row, float* best) {
  for (int64_t t = 0; t < kTile; t += kLanes) {
    Floats found = load(best + t);
    for (int64_t r = 0; r < kTile; ++r) found = maximum(found, load(c + r * kTile + t) * row[r]);
    store(best + t, found);
  }
}

// Half the matrix of cosines, a tile of columns at a time. Rows behind the last token are 0, as is
// what may not count, since no result is less.
template <class T>
void superseded(const Superseded& x, int64_t begin, int64_t end) {
  const int64_t depth = x.keys.cache.head_dim, count = x.keys.tokens - x.start;
  const int64_t tiles = (count + kTile - 1) / kTile;
  float *a = scratch<kTileA>(depth * kTile), *b = scratch<kTileB>(depth * kTile);
  float *c = scratch<kProduct>(kTile * kTile), *inverse = scratch<kVectors>(tiles * kTile);
  for (int64_t head = begin; head < end; ++head) {
    for (int64_t i = 0; i < tiles; ++i)
      inverse_norms(load_clean_tile<T>(x.keys, head, x.start + i * kTile, a), depth,
                    inverse + i * kTile);
    for (int64_t j = 0; j < tiles; ++j) {
      const Tile older = load_clean_tile<T>(x.keys, head, x.start + j * kTile, b);
      float best[kTile] = {};
      for (int64_t i = j; i < tiles; ++i) {
        const Tile newer =
            i == j ? older : load_clean_tile<T>(x.keys, head, x.start + i * kTile, a);
        tile_product(newer.data, newer.stride, kTile, older, depth, c, kTile);
        for (int64_t r = 0; i == j && r < kTile; ++r)
          std::fill(c + r * kTile + r, c + (r + 1) * kTile, 0.0f);
        largest_of_columns(c, inverse + i * kTile, best);
      }
      const int64_t valid = std::min(kTile, count - j * kTile);
      for (int64_t t = 0; t < valid; ++t)
        x.out[head * count + j * kTile + t] = best[t] * inverse[j * kTile + t];
    }
  }
}

template <class T>
void key_norms(const KeyNorms& x, int64_t begin, int64_t end) {
  float* buffer = scratch<kTileB>(x.keys.cache.head_dim * kTile);
  float squares[kTile];
  for (int64_t head = begin; head < end; ++head)
    for (int64_t token = 0; token < x.keys.tokens; token += kTile) {
      const Tile tile = load_tile<T>(x.keys, head, token, buffer);
      squared_norms(tile, x.keys.cache.head_dim, squares);
      const int64_t valid = std::min(kTile, x.keys.tokens - token);
      for (int64_t t = 0; t < valid; ++t)
        x.out[head * x.keys.tokens + token + t] = std::sqrt(squares[t]);
    }
}
