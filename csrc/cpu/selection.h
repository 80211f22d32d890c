// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// Picks units out of their scores; the oracles are ops/topk.py and ops/reference.py: block_max.
// Included by kernels.inc.h.

// Order-preserving: a float is larger where this is. -0 equals 0.
GKV_INLINE uint32_t sortable(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ (bits >> 31 ? ~uint32_t{0} : uint32_t{1} << 31);
}

// The `count`-th largest of the values, digit by digit from the top (a radix selection); sets
// `equals` to how many of its equals are among the `count` largest.
inline uint32_t nth_largest(std::vector<uint32_t>& values, int64_t count, int64_t& equals) {
  constexpr int kDigit = 11;
  uint32_t found = 0;
  for (int shift = 32 - kDigit; values.size() > 1; shift = std::max(0, shift - kDigit)) {
    int32_t buckets[1 << kDigit] = {};
    const uint32_t mask = (1 << kDigit) - 1;
    for (const uint32_t value : values) ++buckets[value >> shift & mask];
    uint32_t digit = mask;
    while (buckets[digit] < count) count -= buckets[digit--];
    values.erase(std::remove_if(values.begin(), values.end(),
                                [&](uint32_t value) { return (value >> shift & mask) != digit; }),
                 values.end());
    if (shift == 0) break;
  }
  found = values.front();
  equals = count;
  return found;
}

// Task: row.
inline void topk_keep(const TopK& x, int64_t begin, int64_t end) {
  std::vector<uint32_t> keys(x.units), left;
  for (int64_t row = begin; row < end; ++row) {
    const float* scores = x.scores + row * x.units;
    for (int64_t i = 0; i < x.units; ++i) keys[i] = sortable(scores[i]);
    left = keys;
    int64_t equals = 0;
    const uint32_t least = nth_largest(left, x.count, equals);
    // Of equals the newer ones stay: pass over the older.
    int64_t pass = std::count(keys.begin(), keys.end(), least) - equals;
    int64_t* keep = x.keep + row * x.count;
    for (int64_t i = 0, place = 0; place < x.count; ++i) {
      const bool equal = keys[i] == least;
      keep[place] = i;
      place += (keys[i] > least) | (equal & (pass <= 0));
      pass -= equal;
    }
  }
}

// Task: block.
inline void block_max(const BlockMax& x, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const float* scores = x.scores + block * x.block_size;
    float best = scores[0];
    int64_t t = 0;
    if (x.block_size >= kLanes) {
      Floats most = load(scores);
      for (t = kLanes; t + kLanes <= x.block_size; t += kLanes)
        most = maximum(most, load(scores + t));
      best = largest(most);
    }
    for (; t < x.block_size; ++t) best = std::max(best, scores[t]);
    x.out[block] = best;
  }
}
