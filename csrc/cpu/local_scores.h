// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// How much the window attends to each older token; the oracle is ops/reference.py: local_scores.
// Included by kernels.inc.h inside the namespace of an instruction set.

// Rows of one query: `group` of them, whole_tiles(tokens) apart.
struct QueryRows {
  float* rows;
  int64_t width;
  int64_t group;
  float* row(int64_t g) const { return rows + g * width; }
};

// Softmax over all live tokens (causal), then the maximum or the mean over the group.
GKV_INLINE void add_probabilities(const QueryRows& query, int64_t visible, int64_t older,
                                  float softcap, bool by_max, float* sums) {
  float* inverse = scratch<kVectors>(query.group);
  for (int64_t g = 0; g < query.group; ++g) {
    cap(query.row(g), visible, softcap);
    inverse[g] = exponentials(query.row(g), visible);
    if (!by_max) inverse[g] /= static_cast<float>(query.group);
  }
  for (int64_t t = 0; t < older; t += kLanes) {
    Floats all{};
    for (int64_t g = 0; g < query.group; ++g) {
      const Floats p = load(query.row(g) + t) * inverse[g];
      all = by_max ? maximum(all, p) : all + p;
    }
    store(sums + t, load(sums + t) + all);
  }
}

// The maximum of the logits over the group, then softmax over the older tokens only.
GKV_INLINE void add_group_maximum(const QueryRows& query, int64_t older, float softcap,
                                  float* sums) {
  for (int64_t g = 1; g < query.group; ++g)
    for (int64_t t = 0; t < older; t += kLanes)
      store(query.row(0) + t, maximum(load(query.row(0) + t), load(query.row(g) + t)));
  cap(query.row(0), older, softcap);  // after the maximum: the cap is monotonous
  const float inverse = exponentials(query.row(0), older);
  for (int64_t t = 0; t < older; t += kLanes)
    store(sums + t, load(sums + t) + load(query.row(0) + t) * inverse);
}

template <class T>
void local_scores_task(const LocalScores& x, int64_t head, int64_t chunk, float* out) {
  const int64_t first = chunk * x.chunk();
  const int64_t count = std::min(x.chunk(), x.window - first), rows = count * x.group;
  const int64_t depth = x.keys.cache.head_dim, older = x.older();
  const int64_t width = whole_tiles(x.keys.tokens);
  float* queries = scratch<kQueries>(depth * rows);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t g = 0; g < x.group; ++g) {
      const T* query = reinterpret_cast<const T*>(x.queries) +
                       (head * x.group + g) * x.head_stride + (first + i) * x.query_stride;
      for (int64_t k = 0; k < depth; ++k)
        queries[k * rows + i * x.group + g] = to_float(query[k]) * x.scale;
    }
  float* logits = scratch<kLogits>(rows * width);
  all_logits<T>(x.keys, head, queries, rows, logits);
  float* sums = scratch<kSums>(width);
  std::fill_n(sums, width, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const QueryRows query{logits + i * x.group * width, width, x.group};
    if (x.form == Form::kMaxLogit)
      add_group_maximum(query, older, x.softcap, sums);
    else
      add_probabilities(query, older + first + i + 1, older, x.softcap,
                        x.form == Form::kMaxProbability, sums);
  }
  const float share = 1.0f / static_cast<float>(x.window);
  for (int64_t t = 0; t < older; ++t) out[t] = sums[t] * share;
}

template <class T>
void local_scores(const LocalScores& x, float* partial, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    local_scores_task<T>(x, task % x.keys.cache.kv_heads, task / x.keys.cache.kv_heads,
                         partial + task * x.older());
}
