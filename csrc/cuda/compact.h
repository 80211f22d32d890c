// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// Moves the surviving tokens of one request into target blocks, in place; the oracle is
// ops/paged.py: ReferenceOps.compact. Moves bits and knows no number format.
//
// A row is what one token and head holds, its key and then its value; one thread block moves one
// half of every row of a head. Number the slots of the source blocks in order. Survivor j lies at
// s(j) and goes to d(j), unless its target is a fresh block, where nobody is in the way. Both rise
// with j. So whatever lies at d(j) belongs to a survivor before j if d(j) < s(j), and behind j if
// d(j) > s(j); and it moves in the same direction as j does, or not at all. Hence no row is lost if
// left movers go in rising order and right movers in falling order, each tile of rows read before
// it is written. To read earlier than that does no harm: the next tile is read while one is
// written.
#pragma once

#include "block.h"

namespace gkv::cuda {

constexpr int kLayersPerLaunch = 128;  // keeps the parameters of a launch below 4 KiB
constexpr int kRowsPerThread = 4;
constexpr int kMaxTile =
    kThreads;               // rows that a block holds at a time: each has a thread to plan it
constexpr int kStages = 3;  // one tile is written, one read, one planned

struct CompactLayer {
  char* cache;
  float* plane;  // nullptr: nothing is kept per token
};

struct Compact {
  CompactLayer layers[kLayersPerLaunch];
  const int64_t* source_ids;
  const int64_t* target_ids;
  const int32_t* target_places;
  const int64_t* keep;
  int64_t source_stride, target_stride, place_stride;  // from layer to layer
  int64_t keep_layer_stride, keep_head_stride;
  int64_t block_stride, head_stride, token_stride;  // of a cache, in bytes
  int32_t num_layers, kv_heads, block_size;
  int32_t num_survivors;
  int32_t row_bytes;
};

// How the rows are dealt out to the threads of the blocks.
struct CompactShape {
  int32_t columns;        // vectors of a row that one block moves
  int32_t parts;          // blocks that share a row
  int32_t rows_per_pass;  // rows that the threads of a block load at once

  GKV_BOTH int32_t tile() const { return kRowsPerThread * rows_per_pass; }
};

template <class Vec>
GKV_BOTH CompactShape compact_shape(int32_t row_bytes) {
  const int32_t vectors = row_bytes / static_cast<int32_t>(sizeof(Vec));
  int32_t columns = (vectors + 1) / 2;
  if (columns > kThreads) columns = kThreads;
  int32_t rows = kThreads / columns;
  if (rows > kMaxTile / kRowsPerThread) rows = kMaxTile / kRowsPerThread;
  return {columns, (vectors + columns - 1) / columns, rows};
}

struct alignas(16) Move {
  int32_t from_block, from_slot;  // from_block is negative where nothing moves
  int32_t to_block, to_slot;
};

struct CompactShared {
  Move moves[kStages][kMaxTile];
  float numbers[kStages][kMaxTile];
  int32_t first_left, last_left, first_right, last_right;  // of the survivors that move there
};

template <class Vec>
struct CompactOwn {
  Vec rows[kRowsPerThread];
};

enum Direction { kStays, kLeft, kRight };

// What one block works on: everything that depends on the layer, the head and the part of a row.
template <class Vec>
struct CompactHead {
  const Compact& x;
  char* cache;
  float* plane;
  const int64_t* source_ids;
  const int64_t* target_ids;
  const int32_t* target_places;
  const int64_t* keep;
  int32_t columns, rows_per_pass;

  GKV_BOTH CompactHead(const Compact& x, int layer, int head, int part)
      : x(x),
        source_ids(x.source_ids + layer * x.source_stride),
        target_ids(x.target_ids + layer * x.target_stride),
        target_places(x.target_places + layer * x.place_stride),
        keep(x.keep + layer * x.keep_layer_stride + head * x.keep_head_stride) {
    const CompactShape shape = compact_shape<Vec>(x.row_bytes);
    const int32_t first = part * shape.columns;
    const int32_t left = x.row_bytes / static_cast<int32_t>(sizeof(Vec)) - first;
    columns = left < shape.columns ? left : shape.columns;
    rows_per_pass = shape.rows_per_pass;
    cache =
        x.layers[layer].cache + head * x.head_stride + first * static_cast<int64_t>(sizeof(Vec));
    float* numbers = x.layers[layer].plane;
    const int64_t start = static_cast<int64_t>(head) * x.block_size;
    plane = numbers && part == 0 ? numbers + start : nullptr;
  }

  GKV_BOTH int32_t tile() const { return kRowsPerThread * rows_per_pass; }

  GKV_BOTH Direction direction(int32_t survivor) const {
    const int32_t place = target_places[survivor / x.block_size];
    if (place < 0) return kLeft;
    const int64_t from = keep[survivor];
    const int64_t to = static_cast<int64_t>(place) * x.block_size + survivor % x.block_size;
    return from == to ? kStays : from > to ? kLeft : kRight;
  }

  // The survivor in a row of a tile; negative behind the last one.
  GKV_BOTH int32_t survivor(int32_t tile_index, int32_t row, int32_t first, int32_t last,
                            Direction way) const {
    const int32_t i = tile_index * tile() + row;
    if (i > last - first) return -1;
    return way == kLeft ? first + i : last - i;
  }

  GKV_BOTH Move move(int32_t survivor, Direction way) const {
    if (survivor < 0 || direction(survivor) != way) return {-1, 0, 0, 0};
    const auto from = static_cast<int32_t>(keep[survivor]);
    return {static_cast<int32_t>(source_ids[from / x.block_size]), from % x.block_size,
            static_cast<int32_t>(target_ids[survivor / x.block_size]), survivor % x.block_size};
  }

  GKV_BOTH char* row(int32_t block, int32_t slot) const {
    return cache + block * x.block_stride + slot * x.token_stride;
  }

  GKV_BOTH float* number(int32_t block, int32_t slot) const {
    return plane + block * (static_cast<int64_t>(x.kv_heads) * x.block_size) + slot;
  }

  // Each thread plans one row of the tile, and reads the number that goes with it.
  GKV_BOTH void plan(CompactShared& shared, int32_t tile_index, int32_t first, int32_t last,
                     Direction way, int thread) const {
    if (thread >= tile()) return;
    const int stage = tile_index % kStages;
    const Move m = move(survivor(tile_index, thread, first, last, way), way);
    shared.moves[stage][thread] = m;
    if (plane && m.from_block >= 0)
      shared.numbers[stage][thread] = *number(m.from_block, m.from_slot);
  }

  GKV_BOTH void read(const CompactShared& shared, int32_t tile_index, int lane, int column,
                     Vec (&rows)[kRowsPerThread]) const {
    if (lane >= rows_per_pass || column >= columns) return;
    GKV_UNROLLED
    for (int r = 0; r < kRowsPerThread; ++r) {
      const Move m = shared.moves[tile_index % kStages][r * rows_per_pass + lane];
      if (m.from_block >= 0)
        rows[r] = reinterpret_cast<const Vec*>(row(m.from_block, m.from_slot))[column];
    }
  }

  GKV_BOTH void write(const CompactShared& shared, int32_t tile_index, int lane, int column,
                      const Vec (&rows)[kRowsPerThread], int thread) const {
    const int stage = tile_index % kStages;
    if (plane && thread < tile()) {
      const Move m = shared.moves[stage][thread];
      if (m.from_block >= 0) *number(m.to_block, m.to_slot) = shared.numbers[stage][thread];
    }
    if (lane >= rows_per_pass || column >= columns) return;
    GKV_UNROLLED
    for (int r = 0; r < kRowsPerThread; ++r) {
      const Move m = shared.moves[stage][r * rows_per_pass + lane];
      if (m.from_block >= 0) reinterpret_cast<Vec*>(row(m.to_block, m.to_slot))[column] = rows[r];
    }
  }
};

// All moves in one direction among the survivors from `first` to `last`.
template <class Vec, class Block>
GKV_BOTH void move_all(const CompactHead<Vec>& x, int32_t first, int32_t last, Direction way,
                       int32_t stride, Block& block) {
  const int32_t tiles = (last - first + x.tile()) / x.tile();
  if (tiles <= 0) return;
  block.each(
      [&](int thread, CompactOwn<Vec>&) { x.plan(block.shared, 0, first, last, way, thread); });
  block.each([&](int thread, CompactOwn<Vec>& own) {
    x.read(block.shared, 0, thread / stride, thread % stride, own.rows);
    x.plan(block.shared, 1, first, last, way, thread);
  });
  GKV_ROLLED
  for (int32_t tile = 0; tile < tiles; ++tile) {
    block.each([&](int thread, CompactOwn<Vec>& own) {
      const int lane = thread / stride, column = thread % stride;
      CompactOwn<Vec> next{};
      x.read(block.shared, tile + 1, lane, column, next.rows);
      x.write(block.shared, tile, lane, column, own.rows, thread);
      own = next;
      x.plan(block.shared, tile + 2, first, last, way, thread);
    });
  }
}

template <class Vec, class Block>
GKV_BOTH void compact(const Compact& x, int layer, int head, int part, Block& block) {
  const CompactHead<Vec> mine(x, layer, head, part);
  const int32_t n = x.num_survivors;
  const int32_t stride = compact_shape<Vec>(x.row_bytes).columns;
  block.each([&](int thread, CompactOwn<Vec>&) {
    if (thread) return;
    block.shared.first_left = block.shared.first_right = n;
    block.shared.last_left = block.shared.last_right = -1;
  });
  block.each([&](int thread, CompactOwn<Vec>&) {
    int32_t first_left = n, last_left = -1, first_right = n, last_right = -1;
    for (int32_t j = thread; j < n; j += kThreads) {
      const Direction way = mine.direction(j);
      if (way == kLeft) {
        first_left = j < first_left ? j : first_left;
        last_left = j;
      } else if (way == kRight) {
        first_right = j < first_right ? j : first_right;
        last_right = j;
      }
    }
    lower(block.shared.first_left, first_left);
    raise(block.shared.last_left, last_left);
    lower(block.shared.first_right, first_right);
    raise(block.shared.last_right, last_right);
  });
  // One loop, so that the moves are compiled once.
  GKV_ROLLED
  for (int pass = 0; pass < 2; ++pass) {
    const bool left = pass == 0;
    move_all(mine, left ? block.shared.first_left : block.shared.first_right,
             left ? block.shared.last_left : block.shared.last_right, left ? kLeft : kRight, stride,
             block);
  }
}

}  // namespace gkv::cuda
