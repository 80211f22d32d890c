// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// Adds the attention of a step's queries to what each cached token got before; the oracle is
// ops/paged.py: ReferenceOps.attention_mass. Included by kernels.inc.h.

constexpr int64_t kMassRows = 48;  // rows of logits at a time

template <class T>
void attention_mass_task(const AttentionMass& x, int64_t request, int64_t head,
                         std::vector<int64_t>& ids) {
  const int64_t first = x.protected_tokens[request], tokens = x.live_lens[request];
  const int64_t start = x.query_starts[request];
  const int64_t num_queries = x.query_starts[request + 1] - start;
  if (first < 0 || num_queries <= 0) return;
  const int64_t block_size = x.cache.block_size, depth = x.cache.head_dim;
  const int32_t* table = x.live_table + request * x.table_stride;
  ids.assign(table, table + (tokens + block_size - 1) / block_size);
  const int64_t width = whole_tiles(tokens), old = tokens - num_queries;
  const int64_t per_pass = std::max<int64_t>(1, kMassRows / x.group);
  float* sums = scratch<kSums>(width);
  std::fill_n(sums, width, 0.0f);
  for (int64_t done = 0; done < num_queries; done += per_pass) {
    const int64_t count = std::min(per_pass, num_queries - done), rows = count * x.group;
    float* queries = scratch<kQueries>(depth * rows);
    for (int64_t r = 0; r < rows; ++r) {
      const T* query = reinterpret_cast<const T*>(x.queries) +
                       (start + done + r / x.group) * x.token_stride +
                       (head * x.group + r % x.group) * x.head_stride;
      for (int64_t k = 0; k < depth; ++k) queries[k * rows + r] = to_float(query[k]) * x.scale;
    }
    // The last query of this pass sees no further.
    const LiveKeys seen{x.cache, ids.data(), old + done + count};
    const int64_t seen_width = whole_tiles(seen.tokens);
    float* logits = scratch<kLogits>(rows * seen_width);
    all_logits<T>(seen, head, queries, rows, logits);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = logits + r * seen_width;
      const int64_t visible = old + done + r / x.group + 1;
      cap(row, visible, x.softcap);
      const float inverse = exponentials(row, visible);
      for (int64_t t = 0; t < visible; t += kLanes)
        store(sums + t, load(sums + t) + load(row + t) * inverse);
    }
  }
  for (int64_t t = std::min(first, old); t < tokens; ++t) {
    float& mass =
        x.plane[(ids[t / block_size] * x.cache.kv_heads + head) * block_size + t % block_size];
    if (t >= old) mass = 0.0f;
    if (t >= first) mass += sums[t];
  }
}

template <class T>
void attention_mass(const AttentionMass& x, int64_t begin, int64_t end) {
  std::vector<int64_t> ids;
  for (int64_t task = begin; task < end; ++task)
    attention_mass_task<T>(x, task / x.cache.kv_heads, task % x.cache.kv_heads, ids);
}
