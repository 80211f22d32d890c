# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What the scorer keeps and moves over the kernels is what it does over the readable operators.

A file of its own, so that two processes can share the scorer's tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gkv_vllm.policies.base import Policy
from gkv_vllm.policies.gkv import GKV
from gkv_vllm.policies.snapkv import SnapKV
from gkv_vllm.worker.scorer import Scorer

from ..worker.world import World
from .test_scorer import ATOL, shapes, worlds


def kept_tokens(scorer: Scorer, world: World) -> Tensor:
    kept: list[Tensor] = []
    move = scorer.ops.compact

    def compact(source: Tensor, target: Tensor, places: Tensor, keep: Tensor) -> None:
        kept.append(keep.clone())
        move(source, target, places, keep)

    scorer.ops.compact = compact  # type: ignore[method-assign]
    scorer.compact([(world.compaction(), world.table)])
    (keep,) = kept
    return keep


@shapes
@pytest.mark.parametrize(
    "policy", [GKV(), GKV(redundancy="none"), GKV(variant="spans", restated=0.2), SnapKV()], ids=str
)
@pytest.mark.parametrize("scope", ["head", "layer", "all"])
def test_survivors_and_what_is_remembered_of_them(shape: Any, policy: Policy, scope: str) -> None:
    """The same tokens are kept, and every bit of the caches is the same afterwards."""
    expected, found = worlds(shape)
    keeps = [
        kept_tokens(world.scorer(policy, moves_tokens=True, scope=scope), world)
        for world in (expected, found)
    ]
    assert torch.equal(*keeps)
    for ours, theirs in zip(found.caches, expected.caches, strict=True):
        assert torch.equal(ours.view(_bits(ours)), theirs.view(_bits(theirs)))
    for ours, theirs in zip(found.planes, expected.planes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=ATOL, equal_nan=True)


def _bits(tensor: Tensor) -> torch.dtype:
    return torch.int16 if tensor.itemsize == 2 else torch.int32
