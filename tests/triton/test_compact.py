# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Compaction in place, bit by bit against the torch reference: any targets, any survivors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from gkv_vllm.triton_kernels import compact as module
from gkv_vllm.triton_kernels.compact import compact
from gkv_vllm.triton_kernels.paged import PagedLayers, pointers
from torch import Tensor

from gkv_vllm.ops.layout import CPULayout, GPULayout
from gkv_vllm.ops.paged import ReferenceOps

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Shape:
    layers: int = 2
    kv_heads: int = 2
    block_size: int = 4
    head_dim: int = 4
    dtype: torch.dtype = torch.bfloat16
    layout: str = "NHD"


@dataclass
class World:
    """Caches and planes full of random bits, NaNs of all kinds among them."""

    shape: Shape
    device: torch.device
    num_blocks: int
    seed: int
    caches: list[Tensor] = field(init=False)
    planes: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        shape = self.shape
        self.generator = torch.Generator().manual_seed(self.seed)
        sizes = [self.num_blocks, shape.kv_heads, shape.block_size, 2 * shape.head_dim]
        if shape.layout == "NHD":
            sizes[1:3] = sizes[2:0:-1]
        self.caches = [self._bits(sizes, shape.dtype) for _ in range(shape.layers)]
        if shape.layout == "NHD":
            self.caches = [cache.transpose(1, 2) for cache in self.caches]
        plane = [self.num_blocks, shape.kv_heads, shape.block_size]
        self.planes = [self._bits(plane, torch.float32) for _ in range(shape.layers)]
        self.layout = CPULayout() if shape.layout == "cpu" else GPULayout()

    def _bits(self, sizes: list[int], dtype: torch.dtype) -> Tensor:
        kind = torch.iinfo(BITS[dtype])
        drawn = torch.randint(
            kind.min, kind.max, sizes, dtype=BITS[dtype], generator=self.generator
        )
        return drawn.to(self.device).view(dtype)

    def layers(self) -> PagedLayers:
        return PagedLayers.of(
            [self.layout.keys(x) for x in self.caches], [self.layout.values(x) for x in self.caches]
        )

    def copies(self) -> tuple[list[Tensor], list[Tensor]]:
        """The bits of caches and planes."""
        caches = [x.view(BITS[x.dtype]).clone() for x in self.caches]
        return caches, [x.view(torch.int32).clone() for x in self.planes]

    def check(self, move: Move, with_planes: bool = True) -> None:
        """Every bit of every layer is what the reference makes it."""
        caches, planes = self.copies()
        # Over integers: torch's own copies of floating-point numbers may change a NaN's bits.
        for i, cache in enumerate(caches):
            ReferenceOps(self.layout).compact(
                cache,
                planes[i] if with_planes else None,
                move.source_ids[i].long().to(self.device),
                move.target_ids[i].long().to(self.device),
                move.keep[i].to(self.device),
            )
        compact(
            self.layers(),
            pointers(self.planes) if with_planes else None,
            move.source_ids.to(self.device),
            move.target_ids.to(self.device),
            move.keep.to(self.device),
            target_places=move.target_places.to(self.device),
        )
        now, planes_now = self.copies()
        assert all(map(torch.equal, now, caches))
        assert all(map(torch.equal, planes_now, planes))


@dataclass
class Move:
    source_ids: Tensor
    target_ids: Tensor
    target_places: Tensor
    keep: Tensor

    @classmethod
    def random(
        cls,
        shape: Shape,
        seed: int,
        *,
        sources: int = 7,
        shared: int = 0,
        fresh: float = 0.0,
        settled: float = 0.0,
        per_head: bool = True,
    ) -> Move:
        """Targets are any of the sources behind the first `shared` ones, or fresh blocks.

        settled: which part of the survivors leads, unmoved if the targets lead too."""
        rng = np.random.default_rng(seed)
        targets = int(rng.integers(1, sources - shared + 1))
        places = shared + np.sort(rng.choice(sources - shared, targets, replace=False))
        places[rng.random(targets) < fresh] = -1
        size = shape.block_size
        source_ids = np.zeros((shape.layers, sources), np.int64)
        target_ids = np.zeros((shape.layers, targets), np.int64)
        for layer in range(shape.layers):
            ids = rng.permutation(cls.blocks(sources))
            source_ids[layer] = ids[:sources]
            other = ids[sources : sources + targets]
            target_ids[layer] = np.where(places < 0, other, ids[np.maximum(places, 0)])
        heads = shape.kv_heads if per_head else 1
        keep = np.zeros((shape.layers, heads, targets * size), np.int64)
        lead = int(settled * targets * size)
        for layer, head in np.ndindex(shape.layers, heads):
            rest = rng.choice(sources * size - lead, targets * size - lead, replace=False)
            keep[layer, head] = np.concatenate([np.arange(lead), lead + np.sort(rest)])
        return cls(*map(torch.from_numpy, (source_ids, target_ids, places.copy(), keep)))

    @staticmethod
    def blocks(sources: int) -> int:
        return 2 * sources + 2


def case(
    device: torch.device, shape: Shape, seed: int, *, with_planes: bool = True, **how: object
) -> None:
    move = Move.random(shape, seed, **how)
    World(shape, device, Move.blocks(move.source_ids.shape[1]), seed).check(move, with_planes)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens at a time, eight looked at: moves of few tokens take many tiles."""
    monkeypatch.setattr(module, "TILE_BYTES", 16)
    monkeypatch.setattr(module, "SCAN", 8)


KINDS = {
    "any_sources": {},
    "shared_lead": {"shared": 3},
    "only_shared_before_the_last": {"shared": 6},
    "some_fresh": {"fresh": 0.4},
    "all_fresh": {"fresh": 1.0},
    "shared_and_fresh": {"shared": 2, "fresh": 0.4},
    "unmoved_lead": {"settled": 0.6},
    "one_set_for_all_heads": {"shared": 1, "fresh": 0.2, "per_head": False},
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kind", KINDS)
def test_no_survivor_is_lost_whatever_moves_where(
    kind: str, seed: int, device: torch.device
) -> None:
    case(device, Shape(layers=1), 1000 * list(KINDS).index(kind) + seed, **KINDS[kind])


@pytest.mark.usefixtures("small_tiles")
def test_random_targets_make_survivors_move_in_all_ways(device: torch.device) -> None:
    """The cases above are what they claim: some move left, some right, and some stay."""
    ways = set()
    for kind, how in KINDS.items():
        move = Move.random(Shape(layers=1), 1000 * list(KINDS).index(kind), **how)
        targets = move.target_places.repeat_interleave(4) * 4 + torch.arange(4).repeat(
            len(move.target_places)
        )
        inside = move.target_places.repeat_interleave(4) >= 0
        ways |= set((targets - move.keep[0])[:, inside].sign().flatten().tolist())
    assert ways == {-1, 0, 1}


SHAPES = {
    "qwen3_hnd": Shape(head_dim=128, block_size=16, layout="HND"),
    "d64_5_heads_fp16": Shape(1, 5, 16, 64, torch.float16),
    "d96_blocks_of_32": Shape(2, 1, 32, 96, torch.bfloat16),
    "d256_fp32": Shape(1, 2, 16, 256, torch.float32, "HND"),
    "cpu_layout": Shape(2, 2, 32, 64, torch.bfloat16, "cpu"),
    "odd_blocks": Shape(2, 3, 7, 8, torch.float32),
}


@pytest.mark.parametrize("with_planes", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_and_layout_moves_whole_rows(
    shape: Shape, with_planes: bool, device: torch.device
) -> None:
    case(device, shape, 5, sources=9, shared=1, fresh=0.2, with_planes=with_planes)


def test_survivors_that_stay_in_place_cost_nothing_and_change_nothing(
    device: torch.device, small_tiles: None
) -> None:
    shape = Shape()
    size = 5 * shape.block_size
    blocks = torch.tensor([[3, 1, 4, 6, 5], [2, 9, 8, 1, 7]])
    keep = torch.arange(size).expand(shape.layers, 1, size)
    world = World(shape, device, 10, 0)
    before, planes = world.copies()
    world.check(Move(blocks, blocks, torch.arange(5), keep))
    after, planes_after = world.copies()
    assert all(map(torch.equal, before, after))
    assert all(map(torch.equal, planes, planes_after))


def test_ids_may_be_int32_and_places_may_differ_between_layers(device: torch.device) -> None:
    shape = Shape()
    sources = torch.tensor([[7, 2, 5, 3], [1, 4, 6, 8]], dtype=torch.int32)
    targets = torch.tensor([[2, 3], [9, 6]], dtype=torch.int32)
    places = torch.tensor([[1, 3], [-1, 2]], dtype=torch.int32)
    keep = torch.tensor([0, 3, 4, 6, 9, 13, 14, 15]).expand(2, 2, 8)
    World(shape, device, 10, 3).check(Move(sources, targets, places, keep))


def test_tables_may_be_one_row_for_all_layers(device: torch.device) -> None:
    shape = Shape(layers=3)
    move = Move.random(shape, 8, shared=1)
    move.source_ids = move.source_ids[:1].expand(3, -1)
    move.target_ids = move.target_ids[:1].expand(3, -1)
    World(shape, device, Move.blocks(7), 8).check(move)


def test_refusals_name_the_argument(device: torch.device) -> None:
    shape = Shape()
    world = World(shape, device, 16, 0)
    move = Move.random(shape, 1)
    good = dict(
        planes=pointers(world.planes),
        source_ids=move.source_ids.to(device),
        target_ids=move.target_ids.to(device),
        target_places=move.target_places.to(device),
        keep=move.keep.to(device),
    )
    bad = dict(
        planes=good["planes"][:1],
        source_ids=good["source_ids"].float(),
        target_ids=good["source_ids"].repeat(1, 2),
        target_places=good["target_places"][None],
        keep=good["keep"][..., 1:],
    )
    for name, tensor in bad.items():
        with pytest.raises(ValueError, match=f"compact: ({name}|target_places) must be"):
            compact(world.layers(), **(good | {name: tensor}))
    more = torch.arange(8 * shape.block_size, device=device).expand(2, 1, -1)
    with pytest.raises(ValueError, match="target_ids must be no more than the 7 sources"):
        compact(
            world.layers(),
            **good
            | dict(
                target_ids=torch.zeros(2, 8, dtype=torch.int64, device=device),
                target_places=torch.arange(8, device=device),
                keep=more,
            ),
        )
