# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Accumulated attention of mixed batches, against the torch reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from gkv_vllm.triton_kernels import attention_mass as module
from gkv_vllm.triton_kernels.attention_mass import attention_mass
from torch import Tensor

from gkv_vllm.ops.layout import CPULayout, GPULayout
from gkv_vllm.ops.paged import ReferenceOps
from tests.triton.requests import NAN

EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Shape:
    """A model, and rows: (live tokens, queries, protected tokens or -1)."""

    rows: tuple[tuple[int, int, int], ...] = ((63, 1, 16), (100, 1, 0), (40, 1, -1), (0, 0, -1))
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    block_size: int = 16
    softcap: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    layout: str = "NHD"


SHAPES = {
    "decode": Shape(),
    "chunk_longer_than_a_tile": Shape(((100, 41, 7), (30, 30, 0), (70, 1, 33), (90, 30, -1))),
    "whole_prompt_protected": Shape(((50, 20, 50), (65, 1, 64)), kv_heads=1),
    "gqa7_d96_blocks_of_32": Shape(
        ((83, 9, 5),), group=7, head_dim=96, block_size=32, dtype=torch.float16, softcap=20.0
    ),
    "cpu_layout_d256_group8": Shape(((40, 3, 1),), 1, 8, 256, layout="cpu", block_size=32),
    "no_group_odd_blocks_fp32": Shape(
        ((75, 1, 0), (61, 17, 20)), kv_heads=5, group=1, block_size=7, dtype=torch.float32
    ),
}


class World:
    """One layer; what is no live key, and what is remembered of no old token, is NaN."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        generator = torch.Generator().manual_seed(0)
        blocks = [-(-live // shape.block_size) for live, _, _ in shape.rows]
        num_blocks = sum(blocks) + 3
        order = iter((torch.randperm(num_blocks - 1, generator=generator) + 1).tolist())
        cache = [num_blocks, shape.kv_heads, shape.block_size, 2 * shape.head_dim]
        if shape.layout == "NHD":
            cache[1:3] = cache[2:0:-1]
        self.cache = torch.full(cache, NAN, dtype=shape.dtype, device=device)
        if shape.layout == "NHD":
            self.cache = self.cache.transpose(1, 2)
        self.layout = CPULayout() if shape.layout == "cpu" else GPULayout()
        self.plane = torch.full((num_blocks, shape.kv_heads, shape.block_size), NAN, device=device)
        # A table of the runner, of which the batch is a part.
        self.table = torch.full((len(blocks), max(blocks) + 5), -1, dtype=torch.int32)
        keys = self.layout.keys(self.cache)
        for row, (live, new, _) in enumerate(shape.rows):
            ids = [next(order) for _ in range(blocks[row])]
            self.table[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            for token in range(live):
                block, slot = ids[token // shape.block_size], token % shape.block_size
                key = torch.randn(shape.kv_heads, shape.head_dim, generator=generator)
                keys[block, :, slot] = key.to(shape.dtype).to(device)
                if token < live - new:
                    past = torch.rand(shape.kv_heads, generator=generator)
                    self.plane[block, :, slot] = past.to(device)
        tokens = sum(new for _, new, _ in shape.rows)
        heads = shape.kv_heads * shape.group
        fused = torch.full((tokens, heads + 2, shape.head_dim), NAN, dtype=shape.dtype)
        drawn = torch.randn(tokens, heads, shape.head_dim, generator=generator)
        fused[:, :heads] = drawn.to(shape.dtype)
        self.queries = fused.to(device)[:, :heads]
        starts = torch.tensor([0, *(new for _, new, _ in shape.rows)]).cumsum(0)
        self.batch = [
            self.table[:, : max(blocks)],
            torch.tensor([live for live, _, _ in shape.rows]),
            starts,
            torch.tensor([first for _, _, first in shape.rows]),
        ]

    def arguments(self) -> list[Tensor]:
        return [x.int().to(self.device) for x in self.batch]

    def expected(self) -> Tensor:
        plane = self.plane.clone()
        shape = self.shape
        ReferenceOps(self.layout).attention_mass(
            self.queries, self.cache, plane, *self.arguments(), shape.head_dim**-0.5, shape.softcap
        )
        return plane

    def run(self) -> Tensor:
        plane = self.plane.clone()
        table, *numbers = self.arguments()
        wide = torch.full((len(table), table.shape[1] + 9), -1, dtype=torch.int32)
        wide = wide.to(self.device)
        wide[:, : table.shape[1]] = table
        attention_mass(
            self.queries,
            self.layout.keys(self.cache),
            plane,
            wide[:, : table.shape[1]],
            *numbers,
            scale=self.shape.head_dim**-0.5,
            softcap=self.shape.softcap,
        )
        return plane

    def tolerance(self) -> float:
        """Relative error of a sum of probabilities: that of a logit, absolutely, in both."""
        shape = self.shape
        keys = self.layout.keys(self.cache).nan_to_num().float().abs().max().item()
        magnitude = keys * self.queries.float().abs().max().item() * shape.head_dim**0.5
        terms = shape.group * max(new for _, new, _ in shape.rows)
        return EPSILON * (2 * magnitude + shape.softcap * 4 + 16 + terms)


@pytest.mark.parametrize("programs", [1, 1024])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_mass_is_the_references_and_nothing_else_is_written(
    shape: Shape, programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROGRAMS", programs)
    world = World(shape, device)
    actual, expected = world.run(), world.expected()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.allclose(actual, expected, rtol=world.tolerance(), atol=0, equal_nan=True)


def test_all_that_queries_give_arrives(device: torch.device) -> None:
    """Without protection each query gives 1 per head, whatever came before."""
    shape = Shape(((63, 1, 0), (48, 20, 0)))
    world = World(shape, device)
    after, before = world.run().double(), world.plane.double()
    for row, (live, new, _) in enumerate(shape.rows):
        ids = world.table[row, : -(-live // shape.block_size)].long().to(device)
        gained = after[ids].nansum((0, 2)) - before[ids].nansum((0, 2))
        # Each number of the plane, below 2 or so, is rounded once more.
        error = world.tolerance() * new * shape.group + 2 * EPSILON * live
        assert (gained - new * shape.group).abs().max() <= error


def test_reruns_agree_to_the_last_bit(device: torch.device) -> None:
    world = World(SHAPES["chunk_longer_than_a_tile"], device)
    first, second = world.run(), world.run()
    assert torch.equal(first.view(torch.int32), second.view(torch.int32))


def test_refusals_name_the_argument(device: torch.device) -> None:
    world = World(Shape(), device)
    names = ("live_table", "live_lens", "query_starts", "protected")
    good = dict(zip(names, world.arguments(), strict=True)) | dict(
        queries=world.queries, keys=world.layout.keys(world.cache), plane=world.plane
    )
    bad = dict(
        queries=world.queries[..., :32],
        keys=good["keys"][0],
        plane=world.plane.half(),
        live_table=good["live_table"].long(),
        live_lens=good["live_lens"][:1],
        query_starts=good["query_starts"][:2],
        protected=good["protected"].long(),
    )
    for name, tensor in bad.items():
        with pytest.raises(ValueError, match=f"attention_mass: {name} must be"):
            attention_mass(**(good | {name: tensor}), scale=1.0)
