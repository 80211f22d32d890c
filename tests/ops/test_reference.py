# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The readable score operations against loops over single numbers, and the identities they obey."""

from __future__ import annotations

import math
from collections.abc import Callable
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

    def group_of(self, kv_head: int) -> range:
        group = self.query_heads // self.kv_heads
        return range(kv_head * group, (kv_head + 1) * group)


SHAPES = {
    "one_head": Shape(1, 1, 12, 4, 8),
    "gqa4": Shape(8, 2, 40, 16, 32),
    "ragged_63_tokens_5_heads": Shape(5, 5, 63, 7, 24),
    "gqa7_softcap": Shape(14, 2, 33, 3, 16, softcap=5.0),
    "window_of_one": Shape(4, 2, 9, 1, 8),
    "one_old_token": Shape(4, 2, 5, 4, 8),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
forms = pytest.mark.parametrize("form", ops.LOCAL_SCORE_FORMS)


def naive_local_scores(queries: Tensor, keys: Tensor, shape: Shape, form: str) -> Tensor:
    """One softmax per query in Python floats; then the maximum or mean over the group, and the
    mean over the window."""
    old = shape.tokens - shape.window
    scores = torch.zeros(shape.kv_heads, old, dtype=torch.float64)
    for kv_head in range(shape.kv_heads):
        for place in range(shape.window):
            group = [queries[head, place] for head in shape.group_of(kv_head)]
            if form == "max_logit":
                rows = [logits(query, keys[kv_head, :old], shape) for query in group]
                weights = softmax([max(column) for column in zip(*rows, strict=True)])
            else:
                seen = keys[kv_head, : old + place + 1]
                rows = [softmax(logits(query, seen, shape)) for query in group]
                reduce = max if form == "max_probability" else mean
                weights = [reduce(column) for column in zip(*rows, strict=True)]
            scores[kv_head] += torch.tensor(weights[:old], dtype=torch.float64) / shape.window
    return scores


def logits(query: Tensor, keys: Tensor, shape: Shape) -> list[float]:
    products = [shape.scale * float(query.double() @ key.double()) for key in keys]
    cap = shape.softcap
    return [cap * math.tanh(x / cap) for x in products] if cap else products


def softmax(numbers: list[float]) -> list[float]:
    powers = [math.exp(x) for x in numbers]
    return [x / sum(powers) for x in powers]


def mean(numbers: tuple[float, ...]) -> float:
    return sum(numbers) / len(numbers)


def tolerance(queries: Tensor, keys: Tensor, shape: Shape) -> float:
    """Relative error of a weight: of its logit (eps times the products summed), doubled for the
    denominator, and a few roundings for exp, division and mean."""
    products = shape.scale * float(queries.norm(dim=-1).max() * keys.norm(dim=-1).max())
    return EPS * (2 * products + 4)


@shapes
@forms
def test_local_scores_are_a_loop_over_queries_and_heads(shape: Shape, form: str) -> None:
    queries, keys = shape.random()
    scores = ops.local_scores(queries, keys, shape.scale, shape.softcap, form)
    expected = naive_local_scores(queries, keys, shape, form)
    assert scores.shape == (shape.kv_heads, shape.tokens - shape.window)
    torch.testing.assert_close(
        scores.double(), expected, rtol=tolerance(queries, keys, shape), atol=0
    )


@shapes
@forms
def test_layers_are_scored_one_by_one(shape: Shape, form: str) -> None:
    layers = [shape.random(seed) for seed in range(3)]
    stacked = ops.local_scores(
        torch.stack([q for q, _ in layers]),
        torch.stack([k for _, k in layers]),
        shape.scale,
        shape.softcap,
        form,
    )
    for scores, (queries, keys) in zip(stacked, layers, strict=True):
        single = ops.local_scores(queries, keys, shape.scale, shape.softcap, form)
        rtol = 2 * tolerance(queries, keys, shape)
        torch.testing.assert_close(scores, single, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "op",
    [
        lambda queries, keys: ops.local_scores(queries, keys, 0.2),
        lambda queries, keys: ops.attention_mass(queries, keys, 0.2),
        lambda queries, keys: ops.redundancy(keys, 0.5),
        lambda queries, keys: ops.redundancy_in_block(keys, 16, 0.5),
    ],
    ids=["local_scores", "attention_mass", "redundancy", "redundancy_in_block"],
)
def test_half_precision_inputs_are_scored_in_float32(
    dtype: torch.dtype, op: Callable[[Tensor, Tensor], Tensor]
) -> None:
    queries, keys = SHAPES["gqa4"].random()
    queries, keys = queries.to(dtype), keys.to(dtype)
    scores = op(queries, keys)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, op(queries.float(), keys.float()))


def test_a_query_does_not_see_the_window_after_it() -> None:
    """A huge key in the window's last place takes weight from the last query only."""
    shape = Shape(1, 1, 20, 4, 8)
    queries, keys = shape.random()
    queries[0, -1] = 0  # so that the last query weighs all tokens alike, whatever the key
    before = ops.local_scores(queries, keys, shape.scale)
    keys[0, -1] = 1e3
    assert torch.equal(ops.local_scores(queries, keys, shape.scale), before)


@forms
def test_large_logits_do_not_overflow(form: str) -> None:
    shape = SHAPES["gqa4"]
    queries, keys = shape.random(size=1e4)
    scores = ops.local_scores(queries, keys, shape.scale, form=form)
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert (scores.sum(-1) <= shape.query_heads / shape.kv_heads).all()


def test_inputs_are_never_written() -> None:
    shape = SHAPES["ragged_63_tokens_5_heads"]
    queries, keys = shape.random()
    for form in ops.LOCAL_SCORE_FORMS:
        ops.normalise(ops.local_scores(queries, keys, shape.scale, form=form))
    ops.attention_mass(queries, keys, shape.scale)
    ops.redundancy(keys, 0.5)
    ops.redundancy_in_block(keys, 16, 0.5)
    before_queries, before_keys = shape.random()
    assert torch.equal(queries, before_queries)
    assert torch.equal(keys, before_keys)


@pytest.mark.parametrize(
    "queries, keys",
    [((4, 8, 16), (2, 7, 16)), ((5, 4, 16), (2, 20, 16))],
    ids=["window_longer_than_tokens", "heads_do_not_divide"],
)
def test_shapes_that_do_not_fit_are_named(queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    for op in (ops.local_scores, ops.attention_mass):
        with pytest.raises(ValueError, match="queries do not fit .* keys"):
            op(torch.zeros(queries), torch.zeros(keys), 1.0)


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match="'mean_logit'; valid: max_probability, max_logit, mean_"):
        ops.local_scores(torch.zeros(1, 1, 8), torch.zeros(1, 3, 8), 1.0, form="mean_logit")


# ---- the attention that a key gets in total


@shapes
def test_attention_mass_is_a_loop_over_queries(shape: Shape) -> None:
    queries, keys = shape.random()
    found = ops.attention_mass(queries, keys, shape.scale, shape.softcap)
    expected = torch.zeros(shape.kv_heads, shape.tokens, dtype=torch.float64)
    for kv_head in range(shape.kv_heads):
        for place in range(shape.window):
            seen = shape.tokens - shape.window + place + 1
            for head in shape.group_of(kv_head):
                weights = softmax(logits(queries[head, place], keys[kv_head, :seen], shape))
                expected[kv_head, :seen] += torch.tensor(weights, dtype=torch.float64)
    rtol = tolerance(queries, keys, shape) + EPS * shape.window * len(shape.group_of(0))
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=0)


# ---- how much a key resembles the others


def naive_redundancy(keys: Tensor, threshold: float) -> list[float]:
    """Cosines in Python floats; of each column the newest row above the threshold is excused."""
    unit = [key.double() / key.double().norm() for key in keys]
    n = len(unit)
    cosines = [
        [float(a @ b) if i != j else 0.0 for j, b in enumerate(unit)] for i, a in enumerate(unit)
    ]
    for column in range(n):
        above = [row for row in range(n) if cosines[row][column] > threshold]
        if above:
            cosines[above[-1]][column] = 0.0
    return [sum(row) / n for row in cosines]


def clustered(tokens: int, head_dim: int, seed: int = 0) -> Tensor:
    """Keys about a few centres, so that some are alike and some are not: [5, tokens, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, head_dim, generator=generator)
    of = torch.randint(4, (5, tokens), generator=generator)
    return centres[of] + 0.4 * torch.randn(5, tokens, head_dim, generator=generator)


# Of a cosine: unit vectors are off by 2 eps, their product by eps per addend at most.
COSINE = 4 * EPS


@pytest.mark.parametrize("tokens", [1, 2, 16, 63])
def test_redundancy_is_a_loop_over_pairs(tokens: int) -> None:
    keys = clustered(tokens, 16)
    expected = torch.tensor([naive_redundancy(head, 0.5) for head in keys])
    atol = COSINE + EPS * 16
    torch.testing.assert_close(ops.redundancy(keys, 0.5), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("tokens", [3, 16, 63])
def test_redundancy_in_block_is_that_of_each_block_over_the_block_size(tokens: int) -> None:
    keys = clustered(tokens, 16)
    expected = torch.tensor(
        [[x * len(b) / 8 for b in head.split(8) for x in naive_redundancy(b, 0.5)] for head in keys]
    )
    atol = COSINE + EPS * 16
    found = ops.redundancy_in_block(keys, 8, 0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_redundancy_of_a_single_whole_block_is_the_exact_one() -> None:
    keys = clustered(63, 16)
    assert torch.equal(ops.redundancy_in_block(keys, 63, 0.5), ops.redundancy(keys, 0.5))


def test_redundancy_of_a_batch_is_that_of_its_requests() -> None:
    """Each request by itself: the authors' dense code looked at the first one only."""
    batch = torch.stack([clustered(63, 16, seed) for seed in range(3)])
    for found, keys in zip(ops.redundancy(batch, 0.5), batch, strict=True):
        atol = 2 * (COSINE + EPS * 16)
        torch.testing.assert_close(found, ops.redundancy(keys, 0.5), rtol=0, atol=atol)


def test_of_duplicates_the_newest_is_excused() -> None:
    """Three copies of a key, all others orthogonal: each copy sees two others, the newest loses its
    place in both of their columns, and in its own column the second loses its place."""
    keys = torch.eye(6)[[0, 1, 0, 2, 0, 3]]
    found = ops.redundancy(keys, 0.5) * 6
    torch.testing.assert_close(found, torch.tensor([2.0, 0, 1, 0, 0, 0]), rtol=0, atol=6 * COSINE)


def test_keys_at_the_threshold_are_no_duplicates() -> None:
    """Their cosine is 0.5 exactly: it counts in both columns, or in neither."""
    keys = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    assert ops.redundancy(keys, 0.5).tolist() == [0.25, 0.25]
    assert ops.redundancy(keys, 0.49).tolist() == [0.0, 0.0]


def test_a_column_without_duplicates_loses_nothing() -> None:
    """The first key included, which an index of "no row" might hit."""
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1e-3]])
    assert ops.redundancy(keys, 0.5)[0].item() == pytest.approx(-1 / 3, abs=1e-5)


def test_redundancy_does_not_depend_on_the_length_of_keys() -> None:
    keys = clustered(63, 16)
    longer = keys * torch.rand(5, 63, 1, generator=torch.Generator().manual_seed(1)).add(0.5)
    atol = 2 * (COSINE + EPS * 16)
    found = ops.redundancy(longer, 0.5)
    torch.testing.assert_close(found, ops.redundancy(keys, 0.5), rtol=0, atol=atol)


# ---- from token scores to block scores


@pytest.mark.parametrize("tokens", [4, 12, 64])
def test_a_block_scores_its_best_token(tokens: int) -> None:
    scores = torch.rand(2, 5, tokens, generator=torch.Generator().manual_seed(tokens))
    found = ops.block_max(scores, 4)
    assert found.shape == (2, 5, tokens // 4)
    for block in range(tokens // 4):
        assert torch.equal(found[..., block], scores[..., 4 * block : 4 * block + 4].amax(-1))


@pytest.mark.parametrize("kernel", [1, 5, 7])
@pytest.mark.parametrize("tokens", [1, 3, 63])
@pytest.mark.parametrize("pool", [ops.max_pool, ops.average_pool])
def test_pooling_looks_at_as_many_neighbours_on_either_side(
    pool: Callable[[Tensor, int], Tensor], tokens: int, kernel: int
) -> None:
    """Below zero too: nothing beyond the ends wins a maximum; in a mean it counts as 0."""
    scores = torch.rand(2, 5, tokens, generator=torch.Generator().manual_seed(0)) - 2
    found = pool(scores, kernel)
    assert found.shape == scores.shape
    for token in range(tokens):
        near = scores[..., max(0, token - kernel // 2) : token + kernel // 2 + 1]
        expected = near.amax(-1) if pool is ops.max_pool else near.sum(-1) / kernel
        # A mean rounds once per addend of at most 2, and once more for the division.
        torch.testing.assert_close(found[..., token], expected, rtol=0, atol=EPS * 2 * kernel)


@pytest.mark.parametrize("kernel", [1, 5, 7])
@pytest.mark.parametrize("tokens", [1, 3, 63])
def test_a_mean_may_leave_out_what_lies_beyond_the_ends(tokens: int, kernel: int) -> None:
    scores = torch.rand(2, 5, tokens, generator=torch.Generator().manual_seed(0)) - 2
    found = ops.average_pool(scores, kernel, padded=False)
    for token in range(tokens):
        near = scores[..., max(0, token - kernel // 2) : token + kernel // 2 + 1]
        torch.testing.assert_close(found[..., token], near.mean(-1), rtol=0, atol=EPS * 2 * kernel)


def test_a_token_is_lifted_to_what_its_neighbours_are_worth_and_never_lowered() -> None:
    scores = torch.tensor([[4.0, 0.0, 2.0, -1.0, -1.0, -4.0]])
    lifted = torch.tensor([[4.0, 2.0, 2.0, 0.0, -1.0, -2.5]])
    torch.testing.assert_close(ops.lift(scores, 3), lifted, rtol=0, atol=EPS * 4)
    assert torch.equal(ops.lift(scores, 1), scores)
    assert torch.equal(ops.lift(scores, 3, unit=32), scores)  # blocks


@pytest.mark.parametrize("kernel", [0, -1, 4])
def test_a_kernel_without_a_middle_is_refused(kernel: int) -> None:
    with pytest.raises(ValueError, match=f"kernel must be a positive odd number.*, got {kernel}"):
        ops.check_kernel(kernel)


@pytest.mark.parametrize("kernel", [None, 1, 7])
def test_an_odd_kernel_is_accepted(kernel: int | None) -> None:
    ops.check_kernel(kernel)


def test_normalised_scores_reach_one_in_every_layer_and_head() -> None:
    scores = torch.rand(3, 5, 63, generator=torch.Generator().manual_seed(0)) * 1e-3
    normal = ops.normalise(scores)
    assert torch.equal(normal.amax(-1), torch.ones(3, 5))
    assert torch.equal(normal.argsort(-1), scores.argsort(-1))


def test_normalising_nothing_but_zeros_is_zero() -> None:
    assert not ops.normalise(torch.zeros(2, 7)).any()


# ---- from layers and heads to one number


def ranks(scores: list[float]) -> list[float]:
    """Place of each entry in ascending order, older first among equals, scaled to [0, 1]."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [order.index(i) / max(1, len(scores) - 1) for i in range(len(scores))]


@pytest.mark.parametrize("heads", [(1, 4), (15, 63), (8, 1)], ids=str)
@pytest.mark.parametrize("by", ["mean", "max", "rank"])
def test_layers_and_heads_are_combined_as_named(by: str, heads: tuple[int, int]) -> None:
    scores = torch.rand(heads, generator=torch.Generator().manual_seed(3)).mul(8).round() / 8
    rows = scores.tolist()
    columns = list(zip(*map(ranks, rows) if by == "rank" else rows, strict=True))
    expected = [max(c) if by == "max" else sum(c) / len(c) for c in columns]
    found = ops.combine(scores, by)
    assert found.shape == heads[-1:]
    # Sums of numbers up to 1, one rounding each, divided once.
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=EPS * len(rows))


@pytest.mark.parametrize("by", ["mean", "max", "rank"])
def test_each_layer_combines_its_own_heads(by: str) -> None:
    scores = torch.rand(3, 5, 63, generator=torch.Generator().manual_seed(4))
    found = ops.combine(scores, by)
    for layer, combined in zip(scores, found, strict=True):
        torch.testing.assert_close(combined, ops.combine(layer, by), rtol=0, atol=EPS * 5)


@pytest.mark.parametrize("by", ["mean", "max", "rank"])
def test_combining_does_not_depend_on_the_order_of_layers_and_heads(by: str) -> None:
    scores = torch.rand(15, 63, generator=torch.Generator().manual_seed(4))
    atol = EPS * 15
    torch.testing.assert_close(
        ops.combine(scores.flip(0), by), ops.combine(scores, by), rtol=0, atol=atol
    )


def test_an_unknown_reduction_is_named() -> None:
    with pytest.raises(ValueError, match="'median'; valid: mean, max, rank"):
        ops.combine(torch.zeros(2, 2), "median")
