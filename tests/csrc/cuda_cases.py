# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Random inputs of the CUDA operators and what the oracles make of them; for any device.

All memory, owned or not, holds random bits (NaN among them), and all of it is compared, bit by
bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gkv_vllm.engine.plan import Recording
from gkv_vllm.ops.layout import GPULayout
from gkv_vllm.ops.live_table import squeeze
from gkv_vllm.ops.paged import ReferenceOps
from gkv_vllm.worker.rings import RingIndex

OPERATORS = ("compact_layers", "prepare_step", "store_window_queries")
TARGETS = ("leading", "lagging", "scattered", "fresh_first", "fresh_between", "all_fresh")
UNTOUCHED = -7


def as_integers(x: Tensor) -> Tensor:
    """The same bits, which torch's own copies of bfloat16 and float16 do not all preserve."""
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(as_integers(found.cpu()), as_integers(expected.cpu()))


def random_bits(rng: np.random.Generator, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    bits = rng.integers(0, 256, (*size[:-1], size[-1] * dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(bits).view(dtype)


# ---- compaction


@dataclass(frozen=True)
class Shape:
    head_dim: int = 128
    kv_heads: int = 2
    block_size: int = 16
    layers: int = 2
    dtype: torch.dtype = torch.bfloat16
    sources: int = 12
    layout: str = "NHD"
    planes: bool = True


SHAPES = {
    "qwen3_8b": Shape(kv_heads=8, layers=1),
    "head_dim_64_hnd": Shape(64, layout="HND", dtype=torch.float16, sources=20),
    "tiles_of_16_rows": Shape(256, dtype=torch.float32, sources=9),
    "head_dim_96_ragged_5_heads": Shape(96, kv_heads=5, layers=1, sources=17),
    "layers_in_one_tensor": Shape(layers=3, layout="layers", sources=7),
    "odd_head_dim": Shape(17, dtype=torch.float16, block_size=8, sources=40),
    "blocks_of_5_tokens": Shape(32, block_size=5, kv_heads=3, sources=61, planes=False),
    "rows_with_padding": Shape(18, layout="padded", sources=30),
    "one_token_a_block": Shape(128, block_size=1, sources=130, layout="HND"),
}


@dataclass
class Compaction:
    """One request in all layers."""

    kv_caches: list[Tensor]
    planes: list[Tensor]
    source_ids: Tensor
    target_ids: Tensor
    target_places: Tensor
    keep: Tensor
    memory: list[Tensor] = field(default_factory=list)
    """All that the caches are views of."""

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.kv_caches,
            self.planes,
            self.source_ids,
            self.target_ids,
            self.target_places,
            self.keep,
        )

    def to(self, device: torch.device | str) -> Compaction:
        """A copy on another device, with the same strides."""
        memory = [x.to(device, copy=True) for x in self.memory]
        of = {x.untyped_storage().data_ptr(): y for x, y in zip(self.memory, memory, strict=True)}
        caches = [
            of[x.untyped_storage().data_ptr()].as_strided(x.shape, x.stride(), x.storage_offset())
            for x in self.kv_caches
        ]
        planes = [x.to(device, copy=True) for x in self.planes]
        rest = (self.source_ids, self.target_ids, self.target_places, self.keep)
        return Compaction(caches, planes, *(x.to(device) for x in rest), memory=memory)

    def expected(self) -> Compaction:
        """The same after `ReferenceOps.compact` of every layer."""
        after = self.to("cpu")
        ops = ReferenceOps(GPULayout())
        for i, cache in enumerate(after.kv_caches):
            plane = as_integers(after.planes[i]) if after.planes else None
            arguments = (plane, after.source_ids[i], after.target_ids[i], after.keep[i])
            ops.compact(as_integers(cache), *arguments)
        return after

    def assert_same_memory(self, other: Compaction) -> None:
        for what in ("memory", "planes"):
            pairs = zip(getattr(self, what), getattr(other, what), strict=True)
            for layer, (found, expected) in enumerate(pairs):
                assert same_bits(found, expected), f"{what} of layer {layer} differ"


def caches(
    rng: np.random.Generator, shape: Shape, blocks: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The caches of all layers, and the memory that they lie in."""
    layers, heads, tokens = shape.layers, shape.kv_heads, shape.block_size
    width = 2 * shape.head_dim
    size = {
        "layers": (blocks, layers, tokens, heads, width),
        "NHD": (blocks, tokens, heads, width),
        "HND": (blocks, heads, tokens, width),
        "padded": (blocks, heads, tokens, width + 4),
    }[shape.layout]
    if shape.layout == "layers":
        memory = random_bits(rng, size, shape.dtype)
        return [memory[:, i].transpose(1, 2) for i in range(layers)], [memory]
    apart = [random_bits(rng, size, shape.dtype) for _ in range(layers)]
    return [x.transpose(1, 2) if shape.layout == "NHD" else x[..., :width] for x in apart], apart


def compaction(shape: Shape, targets: str, seed: int) -> Compaction:
    """`targets` says where survivors go, `seed` draws all else; keep is per head or for all."""
    rng = np.random.default_rng(seed)
    n, size = shape.sources, shape.block_size
    count = int(rng.integers(1, n))
    places = _target_places(rng, targets, n, count)
    source_ids, target_ids = [], []
    for _ in range(shape.layers):
        ids = rng.permutation(2 * n)
        source_ids.append(ids[:n])
        target_ids.append([ids[p] if p >= 0 else ids[n + i] for i, p in enumerate(places)])
    heads = 1 if seed % 3 == 0 else shape.kv_heads
    keep = [[_keep(rng, n * size, count * size) for _ in range(heads)] for _ in range(shape.layers)]
    kv_caches, memory = caches(rng, shape, 2 * n)
    plane = (2 * n, shape.kv_heads, size)
    return Compaction(
        kv_caches,
        [random_bits(rng, plane, torch.float32) for _ in range(shape.layers * shape.planes)],
        torch.from_numpy(np.stack(source_ids)),
        torch.from_numpy(np.array(target_ids)),
        torch.tensor(places, dtype=torch.int32).expand(shape.layers, -1),
        torch.from_numpy(np.array(keep)),
        memory,
    )


def _target_places(rng: np.random.Generator, targets: str, n: int, count: int) -> list[int]:
    """Which source each target is, in rising order; -1 is a fresh block."""
    places = np.arange(count)
    if targets == "lagging":
        places += n - count
    elif targets != "leading":
        places = np.sort(rng.choice(n, count, replace=False))
    if targets == "all_fresh":
        places[:] = -1
    elif targets == "fresh_first":
        places[: 1 + count // 3] = -1
    elif targets == "fresh_between":
        places[rng.random(count) < 0.3] = -1
    return places.tolist()


def _keep(rng: np.random.Generator, tokens: int, count: int) -> np.ndarray:
    """Rising places, dense in parts: stretches that stay, and stretches that move by a little."""
    weights = np.repeat(rng.choice([0.05, 1.0, 20.0], 1 + tokens // 7), 7)[:tokens]
    order = rng.exponential(size=tokens) / weights
    return np.sort(np.argsort(order)[:count])


# ---- the step


@dataclass
class StepCase:
    block_table: Tensor
    seq_lens: Tensor
    query_starts: Tensor
    slots: Tensor
    block_size: int
    window: int
    capacity: int

    def outputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        rows, width = self.block_table.shape
        sizes = ((rows + 2, width + 3), (rows + 2,), (self.capacity,))
        return tuple(torch.full(x, UNTOUCHED, dtype=torch.int32, device=device) for x in sizes)

    def arguments(self, device: torch.device | str = "cpu") -> tuple[Any, ...]:
        tensors = (self.block_table, self.seq_lens, self.query_starts, self.slots)
        return (*(x.to(device) for x in tensors), self.block_size, self.window)

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """By `squeeze` and `RingIndex`; entries behind those in use are nobody's to write."""
        table, lens, places = self.outputs()
        rows = len(self.seq_lens)
        live = squeeze(self.block_table, self.seq_lens, self.block_size)
        for row, length in enumerate(self.seq_lens.tolist()):
            used = -(-length // self.block_size)
            table[row, :used] = live.block_table[row, :used]
        lens[:rows] = live.seq_lens
        index = RingIndex(self.window, self.capacity, torch.device("cpu"))
        starts, lengths = self.query_starts.tolist(), self.seq_lens.tolist()
        index.fill(
            [
                (Recording(slot, lengths[row]), starts[row], starts[row + 1])
                for row, slot in enumerate(self.slots.tolist())
                if slot >= 0 and starts[row + 1] > starts[row]
            ]
        )
        places[:] = index.places
        return table, lens, places


def step(seed: int, rows: int, width: int, *, block_size: int = 16, window: int = 16) -> StepCase:
    """Decodes, chunks shorter and longer than the window, rows without a slot, padding rows."""
    rng = np.random.default_rng(seed)
    table = rng.integers(1, 1000, (rows, width), dtype=np.int32)  # behind the used ones: stale ids
    lengths, tokens = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    slots = np.full(rows, -1, np.int32)
    padding = int(rng.integers(0, 1 + rows // 4)) if rows else 0
    for row in range(rows - padding):
        lengths[row] = rng.integers(1, width * block_size + 1)
        chunk = [1, window - 1, window + 3, 3 * window + 5][int(rng.integers(4))]
        tokens[row] = min(max(1, chunk), lengths[row])
        last = (lengths[row] - 1) // block_size
        table[row, :last][rng.random(last) < rng.choice([0.0, 0.5, 0.95])] = 0
        if rng.random() < 0.7:
            slots[row] = row
    starts = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int32)
    capacity = int(starts[-1] + rng.integers(0, 600))
    tensors = (torch.from_numpy(x) for x in (table, lengths, starts, slots))
    return StepCase(*tensors, block_size=block_size, window=window, capacity=capacity)


# ---- window queries


@dataclass
class Queries:
    queries: Tensor
    places: Tensor
    ring: Tensor

    def to(self, device: torch.device | str) -> Queries:
        """A copy on another device, with the same strides."""
        x = self.queries
        queries = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
        return Queries(queries, self.places.to(device), self.ring.to(device, copy=True))

    def expected(self) -> Tensor:
        ring = self.ring.clone()
        queries = as_integers(self.queries)
        ReferenceOps().store_window_queries(queries, self.places, as_integers(ring))
        return ring


def queries(seed: int, heads: int, head_dim: int, dtype: torch.dtype) -> Queries:
    """The queries of 63 tokens inside a fused projection, a third of them with a place."""
    rng = np.random.default_rng(seed)
    tokens, room = 63, 50
    fused = random_bits(rng, (tokens, (heads + 2) * head_dim), dtype)
    places = np.full(tokens + 9, UNTOUCHED, np.int32)  # behind the tokens: nobody may look there
    places[:tokens] = -1
    places[rng.choice(tokens, 21, replace=False)] = rng.choice(room, 21, replace=False)
    return Queries(
        fused[:, : heads * head_dim].view(tokens, heads, head_dim),
        torch.from_numpy(places),
        random_bits(rng, (room, heads, head_dim), dtype),
    )
