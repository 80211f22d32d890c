// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// Moves surviving tokens into target blocks; the oracle is ops/paged.py: ReferenceOps.compact.
// Moves bits and knows no number format. Included by kernels.inc.h.
//
// Keys lie dimension by dimension, so the survivors of one source block are picked out of a row of
// slots by a shuffle that is the same for every dimension. A target block is put together in a
// staging buffer and then written. As a rule targets are the leading sources and survivors are in
// order, so no later survivor lies in a block already written; where one would (a leading source
// was shared, so that targets lag behind), everything is staged before anything is written.

using Lanes16 = uint16_t __attribute__((vector_size(GKV_VECTOR_BYTES)));
using Lanes32 = uint32_t __attribute__((vector_size(GKV_VECTOR_BYTES)));

template <class Bits>
struct Shuffle {
  using Slots = std::conditional_t<sizeof(Bits) == 2, Lanes16, Lanes32>;
  static constexpr int kWidth = GKV_VECTOR_BYTES / sizeof(Bits);
  static_assert(kWidth <= kTile);
  int64_t source;        // place among the source blocks
  int64_t slot;          // first slot of the vector that is read
  int64_t destination;   // first slot of the target that is written
  Bits lanes[kWidth]{};  // which slots of the vector, in order
};

// One target block: the shuffles that fill a row of its keys.
template <class Bits>
using Fill = std::vector<Shuffle<Bits>>;

template <class Bits>
Fill<Bits> fill_for(const int64_t* keep, int64_t block_size) {
  constexpr int64_t kWidth = Shuffle<Bits>::kWidth;
  Fill<Bits> fill;
  int64_t lane = 0;
  for (int64_t t = 0; t < block_size; ++t) {
    const int64_t source = keep[t] / block_size, within = keep[t] % block_size;
    const int64_t slot = within / kWidth * kWidth;
    if (fill.empty() || fill.back().source != source || fill.back().slot != slot) {
      fill.push_back({source, slot, t, {}});
      lane = 0;
    }
    fill.back().lanes[lane++] = static_cast<Bits>(within - slot);
  }
  return fill;
}

// For one row of `keep`: how each target block is filled, and whether the moves may be streamed.
template <class Bits>
struct Moves {
  std::vector<Fill<Bits>> fills;
  std::vector<bool> stays;  // every token of the block is in its place already
  bool streams = true;

  Moves(const Compact& x, const int64_t* keep) {
    const int64_t block_size = x.cache.block_size;
    for (int64_t j = 0; j < x.num_targets; ++j) {
      const int64_t* mine = keep + j * block_size;
      const int64_t* place = std::find(x.source_ids, x.source_ids + x.num_sources, x.target_ids[j]);
      const int64_t index = place - x.source_ids;  // num_sources: a fresh block
      const bool last = j + 1 == x.num_targets;
      if (index < x.num_sources && !last && mine[block_size] / block_size <= index)
        streams = false;  // a later survivor lies in this target
      bool same = index < x.num_sources;
      for (int64_t t = 0; same && t < block_size; ++t) same = mine[t] == index * block_size + t;
      stays.push_back(same);
      fills.push_back(same ? Fill<Bits>{} : fill_for<Bits>(mine, block_size));
    }
  }
};

template <class Bits>
struct Staging {
  Bits* keys;  // [head_dim, key_stride]
  Bits* values;
  float* plane;
  int64_t key_stride;
};

template <class Bits>
void stage(const Compact& x, const Fill<Bits>& fill, const int64_t* keep, int64_t head,
           const Staging<Bits>& to) {
  using Move = Shuffle<Bits>;
  const int64_t block_size = x.cache.block_size, depth = x.cache.head_dim;
  for (const Move& move : fill) {
    const Bits* from = x.cache.keys<const Bits>(x.source_ids[move.source], head) + move.slot;
    Bits* at = to.keys + move.destination;
    const auto lanes = load_as<typename Move::Slots>(move.lanes);
    // The lanes behind the picked ones are overwritten by the next move, or are padding.
    for (int64_t k = 0; k < depth; ++k) {
      const auto slots = load_as<typename Move::Slots>(from + k * block_size);
      const auto picked = __builtin_shuffle(slots, lanes);
      __builtin_memcpy(at + k * to.key_stride, &picked, sizeof picked);
    }
  }
  for (int64_t t = 0; t < block_size; ++t) {
    const int64_t block = x.source_ids[keep[t] / block_size], slot = keep[t] % block_size;
    std::memcpy(to.values + t * depth, x.cache.values<const Bits>(block, head) + slot * depth,
                depth * sizeof(Bits));
    if (x.plane) to.plane[t] = x.plane[(block * x.cache.kv_heads + head) * block_size + slot];
  }
}

template <class Bits>
void write(const Compact& x, int64_t block, int64_t head, const Staging<Bits>& from) {
  const int64_t block_size = x.cache.block_size, depth = x.cache.head_dim;
  Bits* keys = x.cache.keys<Bits>(block, head);
  for (int64_t k = 0; k < depth; ++k)
    std::memcpy(keys + k * block_size, from.keys + k * from.key_stride, block_size * sizeof(Bits));
  std::memcpy(x.cache.values<Bits>(block, head), from.values, block_size * depth * sizeof(Bits));
  if (x.plane)
    std::memcpy(x.plane + (block * x.cache.kv_heads + head) * block_size, from.plane,
                block_size * sizeof(float));
}

template <class Bits>
void compact_head(const Compact& x, const Moves<Bits>& moves, const int64_t* keep, int64_t head) {
  const int64_t block_size = x.cache.block_size, depth = x.cache.head_dim;
  const int64_t key_stride = block_size + Shuffle<Bits>::kWidth;
  const int64_t tile = ((key_stride + block_size) * depth * sizeof(Bits) + 3) / 4 + block_size;
  const int64_t staged = moves.streams ? 1 : x.num_targets;
  float* buffer = scratch<kStaging>(staged * tile);
  const auto staging = [&](int64_t j) {
    float* plane = buffer + (moves.streams ? 0 : j) * tile;
    Bits* keys = reinterpret_cast<Bits*>(plane + block_size);
    return Staging<Bits>{keys, keys + depth * key_stride, plane, key_stride};
  };
  for (int64_t j = 0; j < x.num_targets; ++j) {
    if (moves.stays[j]) continue;
    stage(x, moves.fills[j], keep + j * block_size, head, staging(j));
    if (moves.streams) write(x, x.target_ids[j], head, staging(j));
  }
  for (int64_t j = 0; j < x.num_targets && !moves.streams; ++j)
    if (!moves.stays[j]) write(x, x.target_ids[j], head, staging(j));
}

template <class Bits>
void compact_heads(const Compact& x, int64_t begin, int64_t end) {
  if (x.keep_stride == 0) {
    const Moves<Bits> moves(x, x.keep);
    for (int64_t head = begin; head < end; ++head) compact_head(x, moves, x.keep, head);
    return;
  }
  for (int64_t head = begin; head < end; ++head) {
    const int64_t* keep = x.keep + head * x.keep_stride;
    compact_head(x, Moves<Bits>(x, keep), keep, head);
  }
}

inline void compact(const Compact& x, int64_t begin, int64_t end) {
  if (x.cache.itemsize == 2)
    compact_heads<uint16_t>(x, begin, end);
  else
    compact_heads<uint32_t>(x, begin, end);
}
