# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Block scores from a paged cache against the arithmetic over a dense gather of live tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gkv_vllm.attention.cpu import gather_keys
from gkv_vllm.engine.plan import Observation, Recording
from gkv_vllm.ops import reference as ops
from gkv_vllm.policies.gkv import GKV
from gkv_vllm.worker import scorer as scorer_module
from gkv_vllm.worker.rings import QueryRing, RingIndex
from gkv_vllm.worker.scorer import BlockScorer, ScoredLayer, state_bytes_per_slot

NAN = float("nan")
SLOTS, SLOT = 3, 1


@dataclass(frozen=True)
class Shape:
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    window: int
    block_size: int
    tokens: int
    holes: tuple[int, ...] = ()
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32

    @property
    def blocks(self) -> int:
        return -(-self.tokens // self.block_size)

    @property
    def live(self) -> list[int]:
        return [i for i in range(self.blocks) if i not in self.holes]


SHAPES = {
    "demo_model": Shape(4, 8, 2, 32, 16, 32, 400, dtype=torch.bfloat16),
    "holes": Shape(3, 8, 2, 32, 16, 32, 640, holes=(1, 2, 5, 11)),
    "ragged_63_tokens_5_heads": Shape(2, 5, 5, 32, 7, 32, 63),
    "ragged_with_holes": Shape(3, 15, 5, 64, 7, 64, 831, holes=(0, 3, 9), softcap=4.0),
    "window_over_three_blocks": Shape(2, 4, 2, 32, 70, 32, 200, holes=(1,)),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def random(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Paged:
    """One request of every layer in a paged cache: NaN wherever none of its live tokens is."""

    def __init__(self, shape: Shape, seed: int = 0, id_seed: int = 0) -> None:
        self.shape = shape
        pool = 2 * shape.blocks + 1
        order = torch.randperm(pool - 1, generator=torch.Generator().manual_seed(id_seed)) + 1
        self.table = order[: shape.blocks].tolist()
        for hole in shape.holes:
            self.table[hole] = 0
        size = (shape.kv_heads, shape.tokens, shape.head_dim)
        self.keys = [
            random(*size, seed=100 * seed + i, dtype=shape.dtype) for i in range(shape.layers)
        ]
        self.queries = [
            random(
                shape.query_heads,
                shape.window,
                shape.head_dim,
                seed=7000 + 100 * seed + i,
                dtype=shape.dtype,
            )
            for i in range(shape.layers)
        ]
        cache = (pool, shape.kv_heads, shape.block_size, 2 * shape.head_dim)
        self.caches = [torch.full(cache, NAN, dtype=shape.dtype) for _ in range(shape.layers)]
        for layer in range(shape.layers):
            self.write(layer, 0, shape.tokens)

    def write(self, layer: int, start: int, end: int) -> None:
        """Keys as the "vec" layouts keep them: [head_dim, block_size], half of a block."""
        shape, cache = self.shape, self.caches[layer]
        transposed = cache.view(*cache.shape[:2], 2, shape.head_dim, shape.block_size)[:, :, 0]
        for position in range(start, end):
            block = self.table[position // shape.block_size]
            if block:
                key = self.keys[layer][:, position]
                transposed[block, :, :, position % shape.block_size] = key

    def scorer(self, policy: GKV) -> BlockScorer:
        shape, index = self.shape, RingIndex(self.shape.window, torch.device("cpu"))
        rings = [
            QueryRing(index, SLOTS, shape.query_heads, shape.head_dim, shape.dtype)
            for _ in range(shape.layers)
        ]
        layers = [
            ScoredLayer(
                0, cache, ring, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5, shape.softcap
            )
            for cache, ring in zip(self.caches, rings, strict=True)
        ]
        scorer = BlockScorer(
            policy,
            layers,
            gather_keys,
            slots=SLOTS,
            max_blocks=shape.blocks + 3,
            block_size=shape.block_size,
        )
        self.record(scorer, SLOT)
        return scorer

    def record(self, scorer: BlockScorer, slot: int) -> None:
        index = scorer.layers[0].ring.index
        index.fill([(Recording(slot, self.shape.tokens), 0, self.shape.window)])
        for layer, queries in zip(scorer.layers, self.queries, strict=True):
            layer.ring.store(queries.transpose(0, 1))

    def score(self, scorer: BlockScorer, slot: int = SLOT) -> Tensor:
        seen = Observation(slot=slot, epoch=5, num_tokens=self.shape.tokens)
        found = scorer.score({"r": seen}, lambda _, group: self.table)
        epoch, scores = found.scores["r"]
        assert epoch == 5
        assert found.seconds > 0
        return torch.tensor(scores)

    def dense(self) -> Tensor:
        """Normalised local scores per block, [layers, kv_heads, blocks], 0 at holes."""
        shape = self.shape
        position = torch.arange(shape.tokens)
        survives = torch.isin(position // shape.block_size, torch.tensor(shape.live))
        result = torch.zeros(shape.layers, shape.kv_heads, shape.blocks)
        for layer in range(shape.layers):
            local = ops.local_scores(
                self.queries[layer],
                self.keys[layer][:, survives],
                shape.head_dim**-0.5,
                shape.softcap,
            )
            local = local / local.amax(-1, keepdim=True)
            block_of = position[survives][: local.shape[-1]] // shape.block_size
            for block in block_of.unique().tolist():
                result[layer, :, block] = local[:, block_of == block].amax(-1)
        return result

    def tolerance(self) -> float:
        """Two float32 evaluations of the same weights: each is off by twice eps times the products
        that a logit sums (query norm times key norm times scale), and so is the maximum it is
        divided by."""
        products = self.shape.head_dim**-0.5 * max(
            float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max())
            for q, k in zip(self.queries, self.keys, strict=True)
        )
        return 8 * torch.finfo(torch.float32).eps * products

    def assert_close(self, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=self.tolerance())


@shapes
@pytest.mark.parametrize("combine_by", ["mean", "max"])
def test_paged_scores_are_the_scores_of_a_dense_gather(shape: Shape, combine_by: str) -> None:
    paged = Paged(shape)
    found = paged.score(paged.scorer(GKV(combine_by=combine_by)))
    paged.assert_close(found, ops.combine(paged.dense(), combine_by))


@shapes
def test_ranks_are_taken_among_live_blocks_only(shape: Shape) -> None:
    """Exact, from the scorer's own history: near ties may rank either way in a dense gather."""
    paged = Paged(shape)
    scorer = paged.scorer(GKV(combine_by="rank"))
    found = paged.score(scorer)
    live = scorer.history[SLOT][:, :, shape.live]
    assert torch.equal(found[shape.live], ops.combine(live, "rank"))


@shapes
def test_where_the_blocks_lie_does_not_matter(shape: Shape) -> None:
    found = [(p := Paged(shape, id_seed=seed)).score(p.scorer(GKV())) for seed in range(3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@shapes
def test_foreign_memory_is_never_read(shape: Shape) -> None:
    """All of it is NaN here: null block, foreign blocks, values, the tail's unwritten slots."""
    paged = Paged(shape)
    before = [cache.clone() for cache in paged.caches]
    scorer = paged.scorer(GKV())
    assert paged.score(scorer).isfinite().all()
    assert scorer.history.isfinite().all()
    for cache, unchanged in zip(paged.caches, before, strict=True):
        assert torch.equal(cache.nan_to_num(), unchanged.nan_to_num())


@shapes
@pytest.mark.parametrize("layers_at_a_time", [1, 2])
def test_how_many_layers_are_gathered_at_a_time_does_not_matter(
    shape: Shape, layers_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged = Paged(shape)
    scorer = paged.scorer(GKV())
    whole = paged.score(scorer)
    calls: list[int] = []
    monkeypatch.setattr(GKV, "score", counted(calls))
    live_keys = len(shape.live) * shape.block_size * shape.kv_heads * shape.head_dim
    monkeypatch.setattr(scorer_module, "GATHER_BYTES", layers_at_a_time * 4 * live_keys)
    scorer.reset([SLOT])
    paged.assert_close(paged.score(scorer), whole)
    assert max(calls) == min(layers_at_a_time, shape.layers)
    assert sum(calls) == shape.layers


def counted(calls: list[int]):
    original = GKV.score

    def score(self: GKV, view):
        calls.append(view.keys.shape[0])
        return original(self, view)

    return score


@shapes
def test_holes_and_the_window_score_zero(shape: Shape) -> None:
    paged = Paged(shape)
    scores = paged.score(paged.scorer(GKV()))
    assert len(scores) == shape.blocks
    in_window = range(-(-(shape.tokens - shape.window) // shape.block_size), shape.blocks)
    for block in range(shape.blocks):
        assert (scores[block] == 0) == (block in shape.holes or block in in_window)


def test_blocks_past_the_tokens_are_ignored() -> None:
    """With asynchronous scheduling the table may already hold the next step's block."""
    paged = Paged(SHAPES["holes"])
    before = paged.score(paged.scorer(GKV()))
    paged.table.append(1 + next(i for i in range(1, 40) if i + 1 not in paged.table))
    assert torch.equal(paged.score(paged.scorer(GKV())), before)


# ---- history


@shapes
def test_history_decays_and_keeps_the_larger_score(shape: Shape) -> None:
    first, second = Paged(shape), Paged(shape, seed=1)
    scorer = first.scorer(GKV(alpha=0.8))
    first.score(scorer)
    for layer, cache in zip(scorer.layers, second.caches, strict=True):
        layer.kv_cache = cache
    second.record(scorer, SLOT)
    found = second.score(scorer)
    expected = torch.maximum(0.8 * first.dense(), second.dense())
    second.assert_close(scorer.history[SLOT][..., : shape.blocks], expected)
    second.assert_close(found, expected.flatten(0, 1).mean(0))


def test_a_block_evicted_in_between_no_longer_counts() -> None:
    whole = SHAPES["holes"]
    first = Paged(replace(whole, holes=()))
    scorer = first.scorer(GKV(alpha=1.0))
    first.score(scorer)
    second = Paged(whole, seed=0)
    for layer, cache in zip(scorer.layers, second.caches, strict=True):
        layer.kv_cache = cache
    scores = second.score(scorer)
    assert not scores[list(whole.holes)].any()
    live = torch.maximum(first.dense(), second.dense())[..., whole.live]
    second.assert_close(scores[whole.live], live.flatten(0, 1).mean(0))


def test_histories_of_slots_are_separate_and_reset_one_by_one() -> None:
    shape = SHAPES["ragged_63_tokens_5_heads"]
    paged = Paged(shape)
    scorer = paged.scorer(GKV())
    for slot in range(SLOTS):
        paged.record(scorer, slot)
        paged.score(scorer, slot)
        assert scorer.history[: slot + 1].flatten(1).any(1).all()
        assert not scorer.history[slot + 1 :].any()
    before = scorer.history.clone()
    scorer.reset([0, 2])
    assert not scorer.history[[0, 2]].any()
    assert torch.equal(scorer.history[1], before[1])


def test_a_reset_slot_scores_like_a_fresh_one() -> None:
    paged, other = Paged(SHAPES["holes"]), Paged(SHAPES["holes"], seed=1)
    fresh = paged.score(paged.scorer(GKV()))
    used = other.scorer(GKV())
    other.score(used)
    used.reset([SLOT])
    for layer, cache in zip(used.layers, paged.caches, strict=True):
        layer.kv_cache = cache
    paged.record(used, SLOT)
    assert torch.equal(paged.score(used), fresh)


def test_requests_of_one_step_do_not_see_each_other() -> None:
    """Two requests in one cache score together as each does alone."""
    shape = SHAPES["holes"]
    paged = Paged(shape)
    scorer = paged.scorer(GKV())
    paged.record(scorer, 2)
    shorter = Observation(slot=2, epoch=0, num_tokens=shape.tokens - shape.block_size)
    whole = Observation(slot=SLOT, epoch=0, num_tokens=shape.tokens)
    together = scorer.score({"a": shorter, "b": whole}, lambda _, group: paged.table).scores
    scorer.reset([SLOT, 2])
    for name, seen in (("a", shorter), ("b", whole)):
        alone = scorer.score({name: seen}, lambda _, group: paged.table).scores
        assert alone[name] == together[name]


# ---- what it costs


@pytest.mark.parametrize("name", ["kv_heads", "head_dim", "scale", "softcap"])
def test_layers_must_be_alike(name: str) -> None:
    paged = Paged(SHAPES["holes"])
    layers = paged.scorer(GKV()).layers
    setattr(layers[1], name, getattr(layers[1], name) + 1)
    with pytest.raises(ValueError, match="they differ in"):
        BlockScorer(GKV(), layers, gather_keys, slots=1, max_blocks=4, block_size=32)


@shapes
def test_layers_of_another_group_are_read_through_their_own_table(shape: Shape) -> None:
    paged = Paged(shape)
    scorer = paged.scorer(GKV())
    together = paged.score(scorer)
    # The last layer moves to group 1, whose table names other blocks of the pool.
    pool = len(paged.caches[-1])
    moved = {block: pool - block for block in range(1, pool)}
    last = scorer.layers[-1]
    order = [0, *(pool - block for block in range(1, pool))]
    last.group, last.kv_cache = 1, last.kv_cache[order].contiguous()
    tables = {0: paged.table, 1: [moved.get(block, 0) for block in paged.table]}
    scorer.reset([SLOT])
    seen = Observation(slot=SLOT, epoch=5, num_tokens=shape.tokens)
    _, scores = scorer.score({"r": seen}, lambda _, group: tables[group]).scores["r"]
    assert torch.equal(torch.tensor(scores), together)


@shapes
def test_the_reserved_bytes_are_the_allocated_bytes(shape: Shape) -> None:
    scorer = Paged(shape).scorer(GKV())
    rings = sum(layer.ring.queries.nbytes for layer in scorer.layers)
    per_slot = state_bytes_per_slot(
        layers=shape.layers,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        window=shape.window,
        max_blocks=shape.blocks + 3,
        query_itemsize=shape.dtype.itemsize,
    )
    assert rings + scorer.history.nbytes == SLOTS * per_slot
