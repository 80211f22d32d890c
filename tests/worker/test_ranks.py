# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What ranks agree on, in two processes: the scores of one process that has all heads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gkv_vllm.policies.gkv import GKV
from gkv_vllm.worker.ranks import Ranks

WORLD = 2
SIZES = ((3, 17), (1, 64))
HEADS = 6


def scores() -> list[Tensor]:
    """[layers, kv_heads, units] of two requests."""
    draw = torch.Generator().manual_seed(0)
    return [torch.rand(layers, HEADS, units, generator=draw) for layers, units in SIZES]


def rank(index: int, folder: str, by: Literal["mean", "max"]) -> None:
    """One of the processes."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=index, world_size=WORLD
    )
    share = HEADS // WORLD
    policy = GKV(combine_by=by)
    mine = [policy.combine(x[:, index * share : (index + 1) * share]) for x in scores()]
    torch.save(Ranks(dist.group.WORLD).agree(mine, policy.combine_ranks), f"{folder}/{index}")
    dist.destroy_process_group()


@pytest.mark.parametrize("by", ["mean", "max"])
def test_ranks_agree_on_what_one_rank_with_all_heads_finds(
    tmp_path: Path, by: Literal["mean", "max"]
) -> None:
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(index), str(tmp_path), by])
        for index in range(WORLD)
    ]
    assert [process.wait(120) for process in ranks] == [0] * WORLD
    first, second = (torch.load(tmp_path / str(index)) for index in range(WORLD))
    for ours, theirs, all_heads in zip(first, second, scores(), strict=True):
        assert torch.equal(ours, theirs)
        expected = GKV(combine_by=by).combine(all_heads)
        # A mean of means: each addend is rounded once more.
        atol = 0 if by == "max" else HEADS * torch.finfo(torch.float32).eps
        torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("size", "heads", "first"),
    [(1, 8, [0]), (2, 8, [0, 4]), (4, 4, [0, 1, 2, 3]), (4, 2, [0, 0, 1, 1])],
)
def test_each_rank_knows_its_heads_of_the_model(size: int, heads: int, first: list[int]) -> None:
    """As vLLM deals them out: copies of a head lie on neighbouring ranks."""
    ranks = [Ranks(kv_heads=heads) for _ in range(size)]
    for place, ranks_ in enumerate(ranks):
        ranks_.rank, ranks_.size = place, size
    assert [x.first_head for x in ranks] == first


def test_one_rank_has_nobody_to_agree_with() -> None:
    (found,) = Ranks().agree([mine := torch.rand(3)], "mean")
    assert found is mine


if __name__ == "__main__":
    rank(int(sys.argv[1]), sys.argv[2], sys.argv[3])  # type: ignore[arg-type]
