# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What stays, from a paged cache, against plain arithmetic over the request's tokens in order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gkv_vllm.ops import reference as ops
from gkv_vllm.ops.layout import CPULayout
from gkv_vllm.policies.gkv import GKV
from gkv_vllm.policies.knorm import KNorm
from gkv_vllm.policies.recency import Recency
from gkv_vllm.worker.scorer import Scorer, history_bytes, plane_bytes, ring_bytes

from .world import NAN, SHAPES, SLOT, SLOTS, Shape, World

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
ATTENTION_ONLY = GKV(redundancy="none")
"""The score in its simplest form: what the tests below recompute by hand."""


def normalised(world: World) -> Tensor:
    """S / max S of every candidate token, [layers, kv_heads, tokens], from the dense keys."""
    shape = world.shape
    first = shape.protected * shape.block_size
    scores = []
    for queries, keys in zip(world.queries, world.keys, strict=True):
        local = ops.local_scores(queries, keys, shape.head_dim**-0.5, shape.softcap)
        count = len(shape.candidates) * shape.block_size
        scores.append((local / local.amax(-1, keepdim=True))[:, first : first + count])
    return torch.stack(scores)


def tolerance(world: World) -> float:
    """Two float32 evaluations of the same weights: each is off by twice eps times the products
    that a logit sums (query norm times key norm times scale), and so is the maximum."""
    products = world.shape.head_dim**-0.5 * max(
        float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max())
        for q, k in zip(world.queries, world.keys, strict=True)
    )
    return 8 * torch.finfo(torch.float32).eps * products


def block_scores(world: World, scorer: Scorer, **selection: int) -> Tensor:
    ((scores,),) = scorer.block_scores([(world.selection(**selection), world.table)])
    return scores


# ---- block granularity


@shapes
@pytest.mark.parametrize("combine_by", ["mean", "max"])
def test_block_scores_are_the_best_tokens_of_a_dense_gather(shape: Shape, combine_by: str) -> None:
    world = World(shape)
    policy = GKV(redundancy="none", combine_by=combine_by)
    found = block_scores(world, world.scorer(policy))
    best = normalised(world).unflatten(-1, (-1, shape.block_size)).amax(-1)
    expected = policy.combine(best.flatten(0, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance(world))


@shapes
@pytest.mark.parametrize("policy", [GKV(), KNorm()], ids=["gkv", "knorm"])
def test_where_the_blocks_lie_does_not_matter(shape: Shape, policy: GKV | KNorm) -> None:
    worlds = [World(shape, id_seed=seed) for seed in range(3)]
    found = [block_scores(world, world.scorer(policy)) for world in worlds]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@shapes
def test_scoring_reads_no_foreign_memory_and_writes_none(shape: Shape) -> None:
    """All of it is NaN here: null block, foreign blocks, the tail's unwritten slots."""
    world = World(shape)
    before = [cache.clone() for cache in world.caches]
    assert block_scores(world, world.scorer(GKV())).isfinite().all()
    for cache, unchanged in zip(world.caches, before, strict=True):
        assert torch.equal(cache.nan_to_num(), unchanged.nan_to_num())


@shapes
def test_layers_of_another_kv_group_are_read_through_their_own_table(shape: Shape) -> None:
    one, two = World(shape), World(shape, kv_groups=2)
    assert two.tables[0] != two.tables[1]
    found = [block_scores(world, world.scorer(GKV())) for world in (one, two)]
    assert torch.equal(*found)


@shapes
def test_block_history_decays_and_keeps_the_larger_score(shape: Shape) -> None:
    first, second = World(shape), World(shape, seed=1)
    policy = GKV(redundancy="none", alpha=0.8)
    scorer = first.scorer(policy)
    block_scores(first, scorer)
    for layer, cache in zip(scorer.layers, second.caches, strict=True):
        layer.kv_cache.copy_(cache)
    second.record(scorer, SLOT)
    found = block_scores(second, scorer, remembered=len(shape.candidates), event=1)
    best = [normalised(w).unflatten(-1, (-1, shape.block_size)).amax(-1) for w in (first, second)]
    expected = policy.combine(torch.maximum(0.8 * best[0], best[1]).flatten(0, 1))
    atol = tolerance(first) + tolerance(second)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_histories_of_slots_are_separate_and_reset_one_by_one() -> None:
    world = World(SHAPES["holes"])
    scorer = world.scorer(GKV())
    assert scorer.history is not None
    for slot in range(SLOTS):
        world.record(scorer, slot)
        block_scores(world, scorer, slot=slot)
        assert scorer.history[: slot + 1].flatten(1).any(1).all()
        assert not scorer.history[slot + 1 :].any()
    before = scorer.history.clone()
    scorer.reset([0, 2])
    assert not scorer.history[[0, 2]].any()
    assert torch.equal(scorer.history[1], before[1])


# ---- token granularity


class Kept:
    """A compaction, and which tokens each layer and head should keep by the dense scores."""

    def __init__(self, world: World, scope: str, fresh: int = 0) -> None:
        self.world = world
        self.before = [cache.clone() for cache in world.caches]
        self.order = world.compaction(fresh=fresh)
        scorer = world.scorer(ATTENTION_ONLY, moves_tokens=True, scope=scope)
        scorer.compact([(self.order, world.table)])
        scores = normalised(world)
        if scope == "layer":
            scores = scores.mean(1, keepdim=True).expand_as(scores)
        elif scope == "all":
            scores = scores.mean((0, 1), keepdim=True).expand_as(scores)
        count = world.shape.keep * world.shape.block_size
        self.scores = scores
        self.best = scores.topk(count).indices.sort(-1).values

    def target_ids(self, layer: int) -> Tensor:
        group = self.world.group_of(layer)
        fresh = self.order.fresh.get(group, {})
        table = self.world.tables[group]
        return torch.tensor([fresh.get(block, table[block]) for block in self.order.targets])


def places(needles: Tensor, haystack: Tensor) -> Tensor:
    """Where each key of `needles` [n, d] stands in `haystack` [m, d]; exact copies only."""
    same = (needles[:, None] == haystack[None]).all(-1)
    assert (same.sum(-1) == 1).all()
    return same.int().argmax(-1)


@shapes
@pytest.mark.parametrize("scope", ["head", "layer", "all"])
@pytest.mark.parametrize("fresh", [0, 2], ids=["own_targets", "fresh_targets"])
def test_the_best_tokens_stand_in_the_targets_in_order(
    shape: Shape, scope: str, fresh: int
) -> None:
    world = World(shape, kv_groups=2)
    kept = Kept(world, scope, fresh)
    first = shape.protected * shape.block_size
    for i, cache in enumerate(world.caches):
        ids = kept.target_ids(i)
        keys, values = CPULayout().read(cache, ids)
        for head in range(shape.kv_heads):
            at = places(keys[head], world.keys[i][head])
            assert torch.equal(values[head], world.values[i][head, at])
            assert (at.diff() > 0).all()
            # Equal to the dense choice but for scores closer than rounding.
            chosen = kept.scores[i, head, at - first].sort().values
            best = kept.scores[i, head, kept.best[i, head]].sort().values
            torch.testing.assert_close(chosen, best, rtol=0, atol=2 * tolerance(world))
        if scope != "head":
            sets = [places(keys[h], world.keys[i][h]) for h in range(shape.kv_heads)]
            assert all(torch.equal(sets[0], other) for other in sets)


@pytest.mark.parametrize("policy", [GKV(), KNorm()], ids=["gkv", "knorm"])
def test_where_nothing_survives_nothing_moves(policy: GKV | KNorm) -> None:
    """A budget that window and tail fill by themselves leaves no block for candidates."""
    world = World(replace(SHAPES["holes"], keep=0))
    before = [cache.clone() for cache in world.caches]
    world.scorer(policy, moves_tokens=True).compact([(world.compaction(), world.table)])
    for cache, unchanged in zip(world.caches, before, strict=True):
        assert torch.equal(cache.nan_to_num(), unchanged.nan_to_num())


@shapes
def test_compaction_writes_its_targets_and_nothing_else(shape: Shape) -> None:
    world = World(shape)
    kept = Kept(world, "head")
    for i, (cache, before) in enumerate(zip(world.caches, kept.before, strict=True)):
        others = torch.ones(len(cache), dtype=torch.bool)
        others[kept.target_ids(i)] = False
        assert torch.equal(cache[others].nan_to_num(), before[others].nan_to_num())


@shapes
def test_shared_targets_keep_their_bytes_when_fresh_blocks_stand_in(shape: Shape) -> None:
    world = World(shape)
    kept = Kept(world, "head", fresh=1)
    shared = world.tables[0][kept.order.targets[0]]
    for cache, before in zip(world.caches, kept.before, strict=True):
        assert torch.equal(cache[shared], before[shared])


@shapes
def test_heads_keep_different_tokens_under_scope_head(shape: Shape) -> None:
    world = World(shape)
    kept = Kept(world, "head")
    keys, _ = CPULayout().read(world.caches[0], kept.target_ids(0))
    sets = [places(keys[h], world.keys[0][h]) for h in range(shape.kv_heads)]
    assert not torch.equal(sets[0], sets[1])


@shapes
def test_token_history_moves_with_its_token(shape: Shape) -> None:
    """The plane of the targets holds F of the very tokens that stand there; new ones start at S."""
    world = World(shape)
    Kept(world, "head")
    first = shape.protected * shape.block_size
    dense = normalised(world)
    for i in range(shape.layers):
        ids = world.ids(i, world.compaction().targets)
        keys, _ = CPULayout().read(world.caches[i], ids)
        plane = world.planes[i][ids].transpose(0, 1).flatten(1)
        for head in range(shape.kv_heads):
            at = places(keys[head], world.keys[i][head])
            torch.testing.assert_close(
                plane[head], dense[i, head, at - first], rtol=0, atol=tolerance(world)
            )


@shapes
def test_only_what_is_remembered_has_a_past(shape: Shape) -> None:
    """Stale numbers of a block's former owner count for nothing, NaN and huge ones included."""
    remembered = len(shape.candidates) - 1
    results = []
    for stale in (NAN, 1e6, 0.0):
        world = World(shape)
        for i, plane in enumerate(world.planes):
            plane.fill_(stale)
            plane[world.ids(i, shape.candidates[:remembered])] = 0.5
        order = world.compaction(remembered=remembered)
        world.scorer(ATTENTION_ONLY, moves_tokens=True).compact([(order, world.table)])
        targets = [world.ids(i, order.targets) for i in range(shape.layers)]
        results.append([p[ids] for p, ids in zip(world.planes, targets, strict=True)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_history_lifts_a_token_that_the_present_window_ignores() -> None:
    """A remembered score of 1 decays to 0.8 and wins over what scores less now."""
    shape = SHAPES["holes"]
    world = World(shape)
    lifted = shape.candidates[3]
    for i, plane in enumerate(world.planes):
        plane[world.ids(i, shape.candidates)] = 0
        plane[world.ids(i, [lifted])] = 1.0
    order = world.compaction(remembered=len(shape.candidates))
    world.scorer(ATTENTION_ONLY, moves_tokens=True).compact([(order, world.table)])
    start = shape.live.index(lifted) * shape.block_size
    keys, _ = CPULayout().read(world.caches[0], world.ids(0, order.targets))
    for head in range(shape.kv_heads):
        kept = places(keys[head], world.keys[0][head]).tolist()
        assert set(range(start, start + shape.block_size)) <= set(kept)


def test_recency_by_token_keeps_the_newest_candidates() -> None:
    shape = SHAPES["ragged_63_new_tokens_5_heads"]
    world = World(shape)
    order = world.compaction()
    world.scorer(Recency(), moves_tokens=True).compact([(order, world.table)])
    count = shape.keep * shape.block_size
    end = (shape.candidates[-1] + 1) * shape.block_size
    keys, _ = CPULayout().read(world.caches[0], world.ids(0, order.targets))
    assert places(keys[0], world.keys[0][0]).tolist() == list(range(end - count, end))


# ---- what it costs


@pytest.mark.parametrize("name", ["kv_heads", "head_dim", "scale", "softcap"])
def test_layers_must_be_alike(name: str) -> None:
    world = World(SHAPES["holes"])
    layers = world.scorer(GKV()).layers
    setattr(layers[1], name, getattr(layers[1], name) + 1)
    with pytest.raises(ValueError, match="they differ in"):
        Scorer(
            GKV(),
            layers,
            world.ops,
            window=16,
            block_size=32,
            moves_tokens=False,
            scope="head",
            slots=1,
            max_blocks=4,
        )


@shapes
def test_the_reserved_bytes_are_the_allocated_bytes(shape: Shape) -> None:
    world = World(shape)
    scorer = world.scorer(GKV())
    assert scorer.history is not None
    assert scorer.rings is not None
    assert scorer.rings.queries.nbytes == SLOTS * ring_bytes(
        layers=shape.layers,
        query_heads=shape.query_heads,
        head_dim=shape.head_dim,
        window=shape.window,
        itemsize=shape.dtype.itemsize,
    )
    assert scorer.history.nbytes == SLOTS * history_bytes(
        layers=shape.layers, kv_heads=shape.kv_heads, max_blocks=shape.blocks + 3
    )
    planes = sum(plane.nbytes for plane in world.planes)
    assert planes == len(world.planes[0]) * plane_bytes(
        layers=shape.layers, kv_heads=shape.kv_heads, block_size=shape.block_size
    )
