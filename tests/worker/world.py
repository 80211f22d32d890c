# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""One request in a paged cache of random bytes, as a worker has it when the request is due."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gkv_vllm.engine.plan import Compaction, Recording, Selection
from gkv_vllm.ops.layout import CPULayout
from gkv_vllm.ops.paged import PagedOps, ReferenceOps
from gkv_vllm.policies.base import Policy
from gkv_vllm.worker.layers import EvictedLayer
from gkv_vllm.worker.rings import QueryRings, RingIndex
from gkv_vllm.worker.scorer import Scorer

NAN = float("nan")
SLOTS, SLOT = 3, 1


@dataclass(frozen=True)
class Shape:
    """A model, and a request of `tokens` logical tokens that lost its `holes` earlier."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    window: int
    block_size: int
    tokens: int
    protected: int = 0
    holes: tuple[int, ...] = ()
    keep: int = 2
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32

    @property
    def blocks(self) -> int:
        return -(-self.tokens // self.block_size)

    @property
    def candidates(self) -> list[int]:
        end = (self.tokens - self.window) // self.block_size
        return [i for i in range(self.protected, end) if i not in self.holes]

    @property
    def live(self) -> list[int]:
        return [i for i in range(self.blocks) if i not in self.holes]

    @property
    def live_tokens(self) -> int:
        return self.tokens - len(self.holes) * self.block_size


SHAPES = {
    "demo_model": Shape(4, 8, 2, 32, 16, 32, 400, protected=2, keep=4, dtype=torch.bfloat16),
    "holes": Shape(3, 8, 2, 32, 16, 32, 640, protected=1, holes=(2, 5, 11), keep=7),
    "ragged_63_new_tokens_5_heads": Shape(2, 5, 5, 32, 7, 32, 191, keep=3),
    "ragged_with_holes_gqa7": Shape(2, 14, 2, 64, 7, 64, 831, 0, (0, 3, 9), keep=5, softcap=4.0),
    "window_over_three_blocks": Shape(2, 4, 2, 32, 70, 32, 300, protected=1, holes=(1,), keep=2),
}


def random(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass
class World:
    """Every layer's cache: NaN wherever none of the request's live tokens is."""

    shape: Shape
    seed: int = 0
    id_seed: int = 0
    kv_groups: int = 1
    """Layers are dealt out to this many KV cache groups, each with a table and cache of its own."""
    ops: PagedOps = field(default_factory=ReferenceOps)
    layer_groups: bool = False
    """Whether each KV cache group is a layer group too, with holes of its own."""

    def __post_init__(self) -> None:
        shape = self.shape
        pool = 2 * shape.blocks + 1
        self.tables = []
        for group in range(self.kv_groups):
            generator = torch.Generator().manual_seed(100 * self.id_seed + group)
            ids = (torch.randperm(pool - 1, generator=generator) + 1).tolist()
            table = ids[: shape.blocks]
            for hole in self.holes(group):
                table[hole] = 0
            self.tables.append(table)
        self.unused = [sorted(set(range(1, pool)) - set(table)) for table in self.tables]
        size = (shape.kv_heads, shape.live_tokens, shape.head_dim)
        first = 1000 * self.seed
        layers = range(shape.layers)
        self.keys = [random(*size, seed=first + i, dtype=shape.dtype) for i in layers]
        self.values = [random(*size, seed=first + 100 + i, dtype=shape.dtype) for i in layers]
        window = (shape.query_heads, shape.window, shape.head_dim)
        self.queries = [random(*window, seed=first + 200 + i, dtype=shape.dtype) for i in layers]
        cache = (pool, shape.kv_heads, shape.block_size, 2 * shape.head_dim)
        self.caches = [torch.full(cache, NAN, dtype=shape.dtype) for _ in layers]
        self.planes = [torch.full(cache[:3], NAN) for _ in layers]
        for i in layers:
            self.write(self.caches[i], i)

    def group_of(self, layer: int) -> int:
        return layer % self.kv_groups

    def holes(self, group: int) -> tuple[int, ...]:
        return tuple(hole + group * self.layer_groups for hole in self.shape.holes)

    def candidates(self, group: int) -> list[int]:
        everything = replace(self.shape, holes=()).candidates
        return [block for block in everything if block not in self.holes(group)]

    def ids(self, layer: int, blocks: list[int]) -> Tensor:
        table = self.tables[self.group_of(layer)]
        return torch.tensor([table[block] for block in blocks])

    def write(self, cache: Tensor, layer: int) -> None:
        holes = self.holes(self.group_of(layer))
        ids = self.ids(layer, [i for i in range(self.shape.blocks) if i not in holes])
        CPULayout().write(cache, ids, self.keys[layer], self.values[layer])

    def scorer(self, policy: Policy, *, moves_tokens: bool = False, scope: str = "head") -> Scorer:
        shape, cpu = self.shape, torch.device("cpu")
        index = RingIndex(shape.window, 4096, cpu)
        rings = QueryRings(
            shape.window,
            layers=shape.layers,
            slots=SLOTS,
            query_heads=shape.query_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            device=cpu,
        )
        paged = policy.needs.paged and moves_tokens
        layers = [
            EvictedLayer(
                ops=self.ops,
                kv_group=self.group_of(i),
                layer_group=self.group_of(i) * self.layer_groups,
                kv_cache=self.caches[i],
                plane=self.planes[i] if paged else None,
                ring=rings.of_layer(i),
                ring_index=index,
                mass=None,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                scale=shape.head_dim**-0.5,
                softcap=shape.softcap,
            )
            for i in range(shape.layers)
        ]
        scorer = Scorer(
            policy,
            layers,
            self.ops,
            window=shape.window,
            block_size=shape.block_size,
            moves_tokens=moves_tokens,
            scope=scope,
            slots=SLOTS,
            max_blocks=shape.blocks + 3,
            rings=rings,
            ring_index=index,
        )
        self.record(scorer, SLOT)
        return scorer

    def record(self, scorer: Scorer, slot: int) -> None:
        """The window's queries reach the rings as a forward hands them over."""
        assert scorer.ring_index is not None
        scorer.ring_index.clear()
        scorer.ring_index.fill([(Recording(slot, self.shape.tokens), 0, self.shape.window)])
        for layer, queries in zip(scorer.layers, self.queries, strict=True):
            layer.before_attention(queries.transpose(0, 1).contiguous())

    def selection(self, *, slot: int = SLOT, remembered: int = 0, event: int = 0) -> Selection:
        shape = self.shape
        return Selection(
            slot=slot,
            num_tokens=shape.tokens,
            protected=shape.protected,
            candidates=tuple(
                self.candidates(group)
                for group in range(self.kv_groups if self.layer_groups else 1)
            ),
            keep=shape.keep,
            remembered=remembered,
            event=event,
            key=11,
        )

    def compaction(self, *, fresh: int = 0, remembered: int = 0) -> Compaction:
        """The first `keep` candidates receive the survivors; the first `fresh` ones elsewhere."""
        targets = self.shape.candidates[: self.shape.keep]
        moved = {
            group: dict(zip(targets[:fresh], unused, strict=False))
            for group, unused in enumerate(self.unused)
        }
        return Compaction(self.selection(remembered=remembered), targets, moved if fresh else {})

    def table(self, group: int) -> Tensor:
        return torch.tensor(self.tables[group])
