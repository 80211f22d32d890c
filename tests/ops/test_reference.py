# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The readable score operations against loops over single numbers, and the identities they obey."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gkv_vllm.ops import reference as ops

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Shape:
    query_heads: int
    kv_heads: int
    tokens: int
    window: int
    head_dim: int
    softcap: float = 0.0

    def random(self, seed: int = 0, size: float = 1.0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        queries = torch.randn(self.query_heads, self.window, self.head_dim, generator=generator)
        keys = torch.randn(self.kv_heads, self.tokens, self.head_dim, generator=generator)
        return queries * size, keys

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


SHAPES = {
    "one_head": Shape(1, 1, 12, 4, 8),
    "gqa4": Shape(8, 2, 40, 16, 32),
    "ragged_63_tokens_5_heads": Shape(5, 5, 63, 7, 24),
    "gqa7_softcap": Shape(14, 2, 33, 3, 16, softcap=5.0),
    "window_of_one": Shape(4, 2, 9, 1, 8),
    "one_old_token": Shape(4, 2, 5, 4, 8),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def naive_local_scores(queries: Tensor, keys: Tensor, shape: Shape) -> Tensor:
    """One softmax per query and head in Python floats; then the maximum and the mean."""
    group, old = shape.query_heads // shape.kv_heads, shape.tokens - shape.window
    scores = torch.zeros(shape.kv_heads, old, dtype=torch.float64)
    for kv_head in range(shape.kv_heads):
        for token in range(old):
            for place in range(shape.window):
                best = max(
                    attention(queries[head, place], keys[kv_head], shape, old + place)[token]
                    for head in range(kv_head * group, (kv_head + 1) * group)
                )
                scores[kv_head, token] += best / shape.window
    return scores


def attention(query: Tensor, keys: Tensor, shape: Shape, position: int) -> list[float]:
    """Weights of the tokens up to and including the query's own position."""
    key = (tuple(query.tolist()), position)
    if key not in _attention:
        logits = [shape.scale * float(query.double() @ k.double()) for k in keys[: position + 1]]
        if shape.softcap:
            logits = [shape.softcap * math.tanh(x / shape.softcap) for x in logits]
        powers = [math.exp(x) for x in logits]
        _attention[key] = [x / sum(powers) for x in powers]
    return _attention[key]


_attention: dict[tuple[tuple[float, ...], int], list[float]] = {}


@pytest.fixture(autouse=True)
def _fresh_attention() -> None:
    _attention.clear()


def tolerance(queries: Tensor, keys: Tensor, shape: Shape) -> float:
    """Relative error of a weight: of its logit (eps times the products summed), doubled for the
    denominator, and a few roundings for exp, division and mean."""
    products = shape.scale * float(queries.norm(dim=-1).max() * keys.norm(dim=-1).max())
    return EPS * (2 * products + 4)


@shapes
def test_local_scores_are_a_loop_over_queries_and_heads(shape: Shape) -> None:
    queries, keys = shape.random()
    scores = ops.local_scores(queries, keys, shape.scale, shape.softcap)
    expected = naive_local_scores(queries, keys, shape)
    assert scores.shape == (shape.kv_heads, shape.tokens - shape.window)
    torch.testing.assert_close(
        scores.double(), expected, rtol=tolerance(queries, keys, shape), atol=0
    )


@shapes
def test_layers_are_scored_one_by_one(shape: Shape) -> None:
    layers = [shape.random(seed) for seed in range(3)]
    stacked = ops.local_scores(
        torch.stack([q for q, _ in layers]),
        torch.stack([k for _, k in layers]),
        shape.scale,
        shape.softcap,
    )
    for scores, (queries, keys) in zip(stacked, layers, strict=True):
        single = ops.local_scores(queries, keys, shape.scale, shape.softcap)
        rtol = 2 * tolerance(queries, keys, shape)
        torch.testing.assert_close(scores, single, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_scored_in_float32(dtype: torch.dtype) -> None:
    queries, keys = SHAPES["gqa4"].random()
    queries, keys = queries.to(dtype), keys.to(dtype)
    scores = ops.local_scores(queries, keys, 0.2)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, ops.local_scores(queries.float(), keys.float(), 0.2))


def test_a_query_does_not_see_the_window_after_it() -> None:
    """A huge key in the window's last place takes weight from the last query only."""
    shape = Shape(1, 1, 20, 4, 8)
    queries, keys = shape.random()
    queries[0, -1] = 0  # so that the last query weighs all tokens alike, whatever the key
    before = ops.local_scores(queries, keys, shape.scale)
    keys[0, -1] = 1e3
    assert torch.equal(ops.local_scores(queries, keys, shape.scale), before)


def test_large_logits_do_not_overflow() -> None:
    shape = SHAPES["gqa4"]
    queries, keys = shape.random(size=1e4)
    scores = ops.local_scores(queries, keys, shape.scale)
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert (scores.sum(-1) <= shape.query_heads / shape.kv_heads).all()


def test_inputs_are_never_written() -> None:
    shape = SHAPES["ragged_63_tokens_5_heads"]
    queries, keys = shape.random()
    ops.normalise(ops.local_scores(queries, keys, shape.scale))
    before_queries, before_keys = shape.random()
    assert torch.equal(queries, before_queries)
    assert torch.equal(keys, before_keys)


@pytest.mark.parametrize(
    "queries, keys",
    [((4, 8, 16), (2, 7, 16)), ((5, 4, 16), (2, 20, 16))],
    ids=["window_longer_than_tokens", "heads_do_not_divide"],
)
def test_shapes_that_do_not_fit_are_named(queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="local_scores: .* queries do not fit .* keys"):
        ops.local_scores(torch.zeros(queries), torch.zeros(keys), 1.0)


# ---- from token scores to block scores


@pytest.mark.parametrize("tokens, blocks", [(12, 3), (63, 16), (63, 20), (1, 1), (4, 2)])
def test_a_block_scores_its_best_token(tokens: int, blocks: int) -> None:
    scores = torch.rand(2, 5, tokens, generator=torch.Generator().manual_seed(tokens))
    found = ops.block_max(scores, 4, blocks)
    for block in range(blocks):
        inside = scores[..., 4 * block : 4 * block + 4]
        expected = inside.amax(-1) if inside.shape[-1] else torch.zeros(2, 5)
        assert torch.equal(found[..., block], expected)


def test_padding_never_wins() -> None:
    """A partial block scores what its tokens score, however little; an empty block scores 0."""
    scores = torch.full((2, 5), 1e-30)
    assert ops.block_max(scores, 4, 3).tolist() == [[torch.tensor(1e-30).item()] * 2 + [0.0]] * 2


def test_normalised_scores_reach_one_in_every_layer_and_head() -> None:
    scores = torch.rand(3, 5, 63, generator=torch.Generator().manual_seed(0)) * 1e-3
    normal = ops.normalise(scores)
    assert torch.equal(normal.amax(-1), torch.ones(3, 5))
    assert torch.equal(normal.argsort(-1), scores.argsort(-1))


def test_normalising_nothing_but_zeros_is_zero() -> None:
    assert not ops.normalise(torch.zeros(2, 7)).any()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_global_score_is_the_larger_of_decayed_past_and_present(alpha: float) -> None:
    past, present = torch.rand(2, 2, 5, 9, generator=torch.Generator().manual_seed(1))
    found = ops.decayed_max(past, present, alpha).flatten().tolist()
    # 0-dim float32 tensors, so that the product is rounded as the operation rounds it.
    for got, old, new in zip(found, past.flatten(), present.flatten(), strict=True):
        assert got == max((alpha * old).item(), new.item())


def test_alpha_zero_is_no_history() -> None:
    past, present = torch.rand(2, 2, 5, 9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ops.decayed_max(past, present, 0.0), present)


@pytest.mark.parametrize("seed", range(10))
def test_block_history_is_the_token_history_max_pooled(seed: int) -> None:
    """Rounds of observations while a sequence grows: bit for bit, as max commutes with rounding."""
    generator = torch.Generator().manual_seed(seed)
    block_size, alpha, window, heads = 4, 0.8, 3, (2, 5)
    by_token = torch.zeros(*heads, 0)
    by_block = torch.zeros(*heads, 0)
    tokens = 7
    for _ in range(6):
        tokens += int(torch.randint(1, 14, (), generator=generator))
        blocks = -(-tokens // block_size)
        local = ops.normalise(torch.rand(*heads, tokens - window, generator=generator))

        grown = torch.zeros(*heads, tokens - window)
        grown[..., : by_token.shape[-1]] = by_token
        by_token = ops.decayed_max(grown, local, alpha)

        grown = torch.zeros(*heads, blocks)
        grown[..., : by_block.shape[-1]] = by_block
        by_block = ops.decayed_max(grown, ops.block_max(local, block_size, blocks), alpha)

        assert torch.equal(by_block, ops.block_max(by_token, block_size, blocks))


# ---- from layers and heads to one number


def ranks(scores: list[float]) -> list[float]:
    """Place of each entry in ascending order, older first among equals, scaled to [0, 1]."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [order.index(i) / max(1, len(scores) - 1) for i in range(len(scores))]


@pytest.mark.parametrize("heads", [(1, 1, 4), (3, 5, 63), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("by", ["mean", "max", "rank"])
def test_layers_and_heads_are_combined_as_named(by: str, heads: tuple[int, int, int]) -> None:
    scores = torch.rand(heads, generator=torch.Generator().manual_seed(3)).mul(8).round() / 8
    rows = scores.flatten(0, -2).tolist()
    columns = list(zip(*map(ranks, rows) if by == "rank" else rows, strict=True))
    expected = [max(c) if by == "max" else sum(c) / len(c) for c in columns]
    found = ops.combine(scores, by)
    assert found.shape == heads[-1:]
    # Sums of numbers up to 1, one rounding each, divided once.
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=EPS * len(rows))


@pytest.mark.parametrize("by", ["mean", "max", "rank"])
def test_combining_does_not_depend_on_the_order_of_layers_and_heads(by: str) -> None:
    scores = torch.rand(3, 5, 63, generator=torch.Generator().manual_seed(4))
    shuffled = scores.flip(0, 1)
    atol = EPS * 15
    torch.testing.assert_close(
        ops.combine(shuffled, by), ops.combine(scores, by), rtol=0, atol=atol
    )


def test_an_unknown_reduction_is_named() -> None:
    with pytest.raises(ValueError, match="'median'; valid: mean, max, rank"):
        ops.combine(torch.zeros(1, 1, 2), "median")
