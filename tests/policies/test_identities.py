# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Where one policy must equal another, or itself in another shape: bit for bit unless said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from gkv_vllm.ops import reference
from gkv_vllm.ops.layout import CPULayout
from gkv_vllm.ops.paged import ReferenceOps
from gkv_vllm.policies.base import Policy
from gkv_vllm.policies.gkv import GKV
from gkv_vllm.policies.h2o import H2O
from gkv_vllm.policies.knorm import KNorm
from gkv_vllm.policies.rkv import RKV
from gkv_vllm.policies.snapkv import SnapKV
from gkv_vllm.policies.view import View

from .paged_requests import IMPLEMENTATIONS, Cache, Model, Request, operators

EPS = torch.finfo(torch.float32).eps
MODELS = {
    "gqa4": Model(query_heads=8, kv_heads=2, head_dim=16, window=8, block_size=32),
    "ragged_5_heads": Model(5, 5, 20, window=7, block_size=32, softcap=4.0),
}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
granularities = pytest.mark.parametrize("moves_tokens", [False, True], ids=["block", "token"])
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def at_eviction(
    policy: Policy,
    model: Model,
    moves_tokens: bool = True,
    *,
    event: int = 0,
    tokens: int = 191,
    implementation: str = "reference",
) -> tuple[View, Tensor]:
    """What the policy sees at a request's first or second eviction, and its scores."""
    cache = Cache(model, policy, operators(implementation), moves_tokens=moves_tokens)
    request = Request.random(model, tokens + 63, protected=1)
    cache.step((request, tokens))
    if event:
        cache.evict(request, keep=3)
        cache.step((request, 63))
    view = cache.observe(request, keep=2)
    return view, cache.watched.scores


def scores(policy: Policy, model: Model, moves_tokens: bool, **when: Any) -> Tensor:
    return at_eviction(policy, model, moves_tokens, **when)[1]


# ---- gkv, rkv, snapkv


@models
@granularities
@pytest.mark.parametrize("history", ["max", "mean", "sum"])
def test_gkv_with_alpha_zero_has_no_history(
    model: Model, moves_tokens: bool, history: Literal["max", "mean", "sum"]
) -> None:
    """At a second eviction: as if nothing were remembered. With another alpha that is not so."""
    for alpha in (0.0, 0.8):
        policy = GKV(alpha=alpha, history=history)
        view, found = at_eviction(policy, model, moves_tokens, event=1)
        assert view.history is not None
        forgotten = replace(view, history=torch.zeros_like(view.history), remembered=0)
        forgotten = replace(forgotten, history=policy.update(forgotten))
        assert torch.equal(policy.score(forgotten), found) == (alpha == 0)


@models
@granularities
@implementations
def test_zipage_of_attention_alone_starts_as_snapkv(
    model: Model, moves_tokens: bool, implementation: str
) -> None:
    """Weight 1, nothing divided, pooled over 5, nothing to remember: G-KV's form of SnapKV. That
    holds at the first eviction; later ones pool nothing and remember."""
    policy = GKV(variant="zipage", score_weight=1.0)
    for event in (0, 1):
        when = {"event": event, "implementation": implementation}
        found = scores(policy, model, moves_tokens, **when)
        other = scores(SnapKV(variant="gkv"), model, moves_tokens, **when)
        assert found.shape == other.shape
        assert torch.equal(found, other) == (event == 0)


@models
@granularities
@pytest.mark.parametrize("event", [0, 1])
def test_gkv_of_present_attention_is_snapkv_before_pooling_and_divided(
    model: Model, moves_tokens: bool, event: int
) -> None:
    """Weight 1 and alpha 0: S / max S, where SnapKV with a kernel of one token scores S."""
    # After a first eviction the two hold different tokens: so both views come from one request.
    view, found = at_eviction(GKV(score_weight=1.0, alpha=0.0), model, moves_tokens, event=event)
    plain = SnapKV(variant="gkv", kernel=1).score(view)
    largest = view.local_scores("max_probability").amax(-1, keepdim=True)
    assert torch.equal(found, plain / largest)


@models
@granularities
@pytest.mark.parametrize("variant", ["original", "gkv"])
@pytest.mark.parametrize("kernel", [None, 3])
def test_rkv_without_redundancy_is_snapkv(
    model: Model, moves_tokens: bool, variant: Literal["original", "gkv"], kernel: int | None
) -> None:
    found = scores(RKV(variant, score_weight=1.0, kernel=kernel), model, moves_tokens)
    assert torch.equal(found, scores(SnapKV(variant, kernel), model, moves_tokens))


@models
@granularities
@pytest.mark.parametrize("variant", ["paper", "zipage"])
@pytest.mark.parametrize("event", [0, 1])
def test_no_redundancy_is_a_weight_of_one(
    model: Model, moves_tokens: bool, variant: Literal["paper", "zipage"], event: int
) -> None:
    """Event 1 after the same kept set, as both chose it by the same scores."""
    by_kind = scores(GKV(variant, redundancy="none"), model, moves_tokens, event=event)
    by_weight = scores(GKV(variant, score_weight=1.0), model, moves_tokens, event=event)
    assert torch.equal(by_kind, by_weight)


class NoRedundancy(ReferenceOps):
    """Operators of which the costly one must not be called."""

    def redundancy(self, *arguments: Any) -> Tensor:
        raise AssertionError("redundancy without weight")

    redundancy_in_block = superseded = redundancy


@pytest.mark.parametrize(
    "policy",
    [
        GKV(redundancy="none"),
        GKV(score_weight=1.0),
        GKV(score_weight=1.0, restated=0.4),
        GKV("zipage", score_weight=1.0),
        RKV(score_weight=1.0),
    ],
    ids=str,
)
def test_redundancy_without_weight_is_not_computed(policy: Policy) -> None:
    view, found = at_eviction(policy, MODELS["gqa4"], event=1)
    assert torch.equal(policy.score(replace(view, ops=NoRedundancy().bind(view.ops.caches))), found)


@pytest.mark.parametrize("heads", [1, 5, 15])
def test_layers_and_heads_agree_on_the_mean_unless_a_policy_says_otherwise(heads: int) -> None:
    numbers = torch.randn(3, heads, 63, generator=torch.Generator().manual_seed(0))
    expected = sum(numbers.unbind(1)) / heads
    # One rounding per addend.
    atol = EPS * heads * float(numbers.abs().max())
    for policy in (Policy(), KNorm(), H2O()):
        torch.testing.assert_close(policy.combine(numbers), expected, rtol=0, atol=atol)


@granularities
def test_gkv_combines_layers_and_heads_as_named(moves_tokens: bool) -> None:
    found = scores(GKV(), MODELS["gqa4"], moves_tokens).flatten(0, 1)
    combined = {by: GKV(combine_by=by).combine(found) for by in ("mean", "max", "rank")}
    for by, numbers in combined.items():
        assert torch.equal(numbers, reference.combine(found, by))
    assert torch.equal(GKV().combine(found), combined["mean"])
    assert not torch.equal(combined["mean"], combined["max"])
    assert not torch.equal(combined["mean"], combined["rank"])


@models
@pytest.mark.parametrize("variant", ["paper", "zipage"])
def test_what_the_variant_sets_may_be_given(
    model: Model, variant: Literal["paper", "zipage"]
) -> None:
    given = {
        "paper": GKV(variant, score_weight=0.5, temperature=1.0, redundancy="exact"),
        "zipage": GKV(variant, score_weight=0.2, temperature=0.4, redundancy="block"),
    }
    found = scores(given[variant], model, True, event=1)
    assert torch.equal(found, scores(GKV(variant), model, True, event=1))


# ---- redundancy


@models
@implementations
def test_redundancy_within_blocks_is_exact_where_there_is_one_block(
    model: Model, implementation: str
) -> None:
    """Of the unprotected tokens. Two operators: equal up to the rounding of a mean of cosines."""
    view, _ = at_eviction(RKV(), model, tokens=192, implementation=implementation)
    for protected, block_sized in ((160, True), (128, False)):
        of_last = replace(view, protected=protected)
        exact = of_last.redundancy()
        within = of_last.redundancy(within_blocks=True)
        assert exact.count_nonzero() == exact[..., protected:].numel()
        atol = 4 * EPS * (model.head_dim + 4)
        assert torch.allclose(exact, within, rtol=0, atol=atol) == block_sized


@models
@implementations
@pytest.mark.parametrize("within_blocks", [False, True])
def test_redundancy_of_layers_is_that_of_each(
    model: Model, implementation: str, within_blocks: bool
) -> None:
    view, _ = at_eviction(RKV(), model, implementation=implementation)
    found = view.redundancy(within_blocks=within_blocks)
    for i, expected in enumerate(found):
        caches = replace(view.ops.caches, kv_caches=view.ops.caches.kv_caches[i : i + 1])
        ops = operators(implementation).bind(caches)
        single = replace(view, ops=ops, block_ids=view.block_ids[i : i + 1])
        assert torch.equal(single.redundancy(within_blocks=within_blocks)[0], expected)


@models
def test_redundancy_is_a_softmax_over_unprotected_tokens(model: Model) -> None:
    """The window's share included, protected tokens left out."""
    view, _ = at_eviction(RKV(), model)
    shares = replace(view, window=0).redundancy()
    assert not shares[..., : view.protected].any()
    assert (shares[..., view.protected :] > 0).all()
    # Each share is rounded once and they add up to one.
    ones = torch.ones(shares.shape[:-1])
    torch.testing.assert_close(shares.sum(-1), ones, rtol=0, atol=EPS * view.live_tokens)
    assert torch.equal(view.redundancy(), shares[..., : -view.window])


# ---- attention over a set


def attend(queries: Tensor, keys: Tensor, values: Tensor, model: Model) -> Tensor:
    logits = queries.unflatten(0, (model.kv_heads, -1)) @ keys[:, None].transpose(-1, -2)
    logits = logits * model.scale
    if model.softcap:
        logits = torch.tanh(logits / model.softcap) * model.softcap
    return logits.softmax(-1) @ values[:, None]


@models
def test_attention_does_not_depend_on_the_order_of_tokens_in_a_head(model: Model) -> None:
    """Why survivors may move: keys carry their positions. A permutation for each head."""
    request = Request.random(model, 63)
    kv_cache = torch.full((4, model.kv_heads, 32, 2 * model.head_dim), torch.nan)
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(63, generator=generator) for _ in range(model.kv_heads)])
    at = order[..., None].expand(-1, -1, model.head_dim)
    ids = torch.tensor([3, 1])
    keys, values = request.keys[0], request.values[0]
    CPULayout().write(kv_cache, ids, keys.gather(1, at), values.gather(1, at))
    moved = [tokens[:, :63] for tokens in CPULayout().read(kv_cache, ids)]
    queries = request.queries[0, :, -1:]
    before, after = attend(queries, keys, values, model), attend(queries, *moved, model)
    # The same weights, each off by eps per addend of its logit, and a sum over 63 in another order.
    products = model.scale * float(queries.norm(dim=-1).max() * keys.norm(dim=-1).max())
    atol = EPS * (4 * products + 2 * 63) * float(values.abs().max())
    torch.testing.assert_close(after, before, rtol=0, atol=atol)


@models
@pytest.mark.parametrize("form", reference.LOCAL_SCORE_FORMS)
def test_local_scores_move_with_their_tokens(model: Model, form: str) -> None:
    request = Request.random(model, 63)
    keys, queries = request.keys[0], request.queries[0, :, -model.window :]
    older = 63 - model.window
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(older, generator=generator) for _ in range(model.kv_heads)])
    at = torch.cat([order, torch.arange(older, 63).expand(model.kv_heads, -1)], 1)
    moved = keys.gather(1, at[..., None].expand(-1, -1, model.head_dim))
    found = reference.local_scores(queries, moved, model.scale, model.softcap, form)
    expected = reference.local_scores(queries, keys, model.scale, model.softcap, form)
    products = model.scale * float(queries.norm(dim=-1).max() * keys.norm(dim=-1).max())
    rtol = EPS * (4 * products + 2 * 63)
    torch.testing.assert_close(found, expected.gather(1, order), rtol=rtol, atol=0)


# ---- accumulated attention


CHUNKS = {
    "one_prefill": [191],
    "chunked": [64, 64, 63],
    "ragged_then_single": [1, 63, 100, *[1] * 27],
    "all_single": [1] * 191,
}


@models
@implementations
@pytest.mark.parametrize("protected", [0, 2])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_streamed_attention_is_one_dense_pass(
    model: Model, implementation: str, protected: int, chunks: list[int]
) -> None:
    """However the queries came. Not bit for bit: a sum over 191 queries, in another order."""
    cache = Cache(model, H2O(), operators(implementation), moves_tokens=True)
    request = Request.random(model, 191, protected=protected)
    for chunk in chunks:
        cache.step((request, chunk))
    found = cache.observe(request, keep=2).attention_mass()
    dense = torch.stack(
        [
            reference.attention_mass(queries, keys, model.scale, model.softcap)
            for queries, keys in zip(request.queries, request.keys, strict=True)
        ]
    )
    dense[..., : protected * model.block_size] = 0
    group = model.query_heads // model.kv_heads
    products = model.scale * float(
        request.queries.norm(dim=-1).max() * request.keys.norm(dim=-1).max()
    )
    rtol = EPS * (4 * products + 2 * 191 * group)
    torch.testing.assert_close(found, dense[..., : -model.window], rtol=rtol, atol=0)


@models
def test_every_query_gives_one_attention_in_all(model: Model) -> None:
    cache = Cache(model, H2O(), operators("reference"), moves_tokens=True)
    request = Request.random(model, 191)
    cache.step((request, 100))
    cache.step((request, 91))
    view = replace(cache.observe(request, keep=2), window=0)
    total = view.attention_mass().sum(-1)
    given = 191 * model.query_heads / model.kv_heads
    # As many roundings as addends, each of a partial sum.
    atol = EPS * given * (given + 191)
    torch.testing.assert_close(total, torch.full_like(total, given), rtol=0, atol=atol)
