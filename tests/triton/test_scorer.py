# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The worker's scorer over the kernels does what it does over the readable operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gkv_vllm.engine.plan import Selection
from gkv_vllm.ops.layout import CPULayout
from gkv_vllm.ops.paged import PagedOps, ReferenceOps
from gkv_vllm.ops.triton import TritonOps
from gkv_vllm.policies.base import Policy
from gkv_vllm.policies.gkv import GKV
from gkv_vllm.policies.knorm import KNorm
from gkv_vllm.policies.rkv import RKV
from gkv_vllm.policies.snapkv import SnapKV
from gkv_vllm.worker.scorer import Scorer

from ..worker.world import SHAPES, SLOT, World

CPU_KERNELS = TritonOps(CPULayout())
ATOL = 2e-5
"""Scores are at most 1; the errors of logits are relative errors of probabilities: 64 sums."""

shapes = pytest.mark.parametrize(
    "shape", [SHAPES[name] for name in ("holes", "ragged_with_holes_gqa7")], ids=["holes", "ragged"]
)
POLICIES: dict[str, Policy] = {
    "gkv": GKV(),
    "gkv, no redundancy": GKV(redundancy="none"),
    "gkv, redundancy in blocks": GKV(redundancy="block", score_weight=0.3),
    "gkv, mean of history": GKV(history="mean"),
    "gkv, spans, restated": GKV(variant="spans", restated=0.2),
    "rkv": RKV(),
    "snapkv": SnapKV(),
    "knorm": KNorm(),
}
# Layers with tables of their own reach a policy through what is fused and what is not: one of each.
GROUPED = [(name, 1) for name in POLICIES] + [("gkv", 2), ("rkv", 2)]


def worlds(shape: Any, **kwargs: Any) -> list[World]:
    """The same request under both operators."""
    return [World(shape, ops=ops, **kwargs) for ops in (ReferenceOps(), CPU_KERNELS)]


def ask_otherwise(pair: list[World], scorers: list[Scorer]) -> None:
    """Other queries reach the rings: a layer's are those of its neighbour."""
    for world, scorer in zip(pair, scorers, strict=True):
        world.queries = [*world.queries[1:], world.queries[0]]
        world.record(scorer, SLOT)


@shapes
@pytest.mark.parametrize(("name", "kv_groups"), GROUPED)
def test_block_scores(shape: Any, name: str, kv_groups: int) -> None:
    """Twice, with other queries, so that the second has a history that matters."""
    policy = POLICIES[name]
    pair = worlds(shape, kv_groups=kv_groups)
    scorers = [world.scorer(policy) for world in pair]
    for event in range(2):
        remembered = event * len(shape.candidates)

        def seen(world: World, remembered: int = remembered, event: int = event) -> Selection:
            return world.selection(remembered=remembered, event=event)

        theirs, ours = (
            scorer.block_scores([(seen(world), world.table)])
            for scorer, world in zip(scorers, pair, strict=True)
        )
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=ATOL)
        ask_otherwise(pair, scorers)
    if scorers[0].history is not None:
        torch.testing.assert_close(scorers[0].history, scorers[1].history, rtol=1e-5, atol=ATOL)


def test_each_layer_group_has_candidates_and_a_history_of_its_own() -> None:
    policy = GKV(redundancy="none")
    pair = worlds(SHAPES["holes"], kv_groups=2, layer_groups=True)
    assert pair[0].candidates(0) != pair[0].candidates(1)
    scorers = [world.scorer(policy) for world in pair]
    for remembered in (0, len(pair[0].candidates(0))):
        theirs, ours = (
            scorer.block_scores([(world.selection(remembered=remembered), world.table)])
            for scorer, world in zip(scorers, pair, strict=True)
        )
        assert len(ours[0]) == 2
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=ATOL)
        theirs, ours = (scorer.history for scorer in scorers)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=ATOL)
        ask_otherwise(pair, scorers)


def test_requests_that_are_scored_together_are_scored_as_alone() -> None:
    """Two slots of different histories in one launch."""
    shape = SHAPES["holes"]
    (_, alone), (_, together) = worlds(shape), worlds(shape)
    scorers = [world.scorer(GKV()) for world in (alone, together)]
    scorers[1].together = 10 * shape.tokens
    slots = [SLOT, SLOT - 1]
    for world, scorer in zip((alone, together), scorers, strict=True):
        world.record(scorer, slots[1])
    seen = [replace(alone.selection(slot=slot)) for slot in slots]
    one_by_one = [scorers[0].block_scores([(x, alone.table)])[0] for x in seen]
    at_once = scorers[1].block_scores([(x, together.table) for x in seen])
    for ours, theirs in zip(at_once, one_by_one, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(scorers[0].history, scorers[1].history)


def test_the_operators_are_the_kernels() -> None:
    ops: PagedOps = CPU_KERNELS
    assert ops.name == "triton"
    assert World(SHAPES["holes"], ops=ops).scorer(GKV()).ops.fuses
