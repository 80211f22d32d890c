# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What holds for every policy that the registry knows, with each value of its named choices.

A new policy is in here as soon as it is registered; what it scores is its own test's business."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor

from gkv_vllm.policies import registry
from gkv_vllm.policies.base import Policy, literal_choices

from .paged_requests import Cache, Model, Request, operators


def policies() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every name with its default parameters, and with each value of each named choice."""
    for name in registry.names():
        yield name, {}
        cls = registry.load(name)
        hints = get_type_hints(cls)
        for parameter in fields(cls):
            for value in literal_choices(hints[parameter.name]):
                if value != parameter.default:
                    yield name, {parameter.name: value}


@dataclass(frozen=True)
class Shape:
    """A model, and a request that is evicted when it has `tokens`, and `later` when it has more."""

    model: Model
    tokens: int
    later: int
    protected: int = 0
    keep: int = 2


SHAPES = {
    "sinks": Shape(Model(4, 4, 16, 8, 32), tokens=200, later=272, protected=1),
    "prompt_gqa4_long_window_bf16": Shape(
        Model(8, 2, 16, 40, 32, dtype=torch.bfloat16), tokens=243, later=275, protected=2
    ),
    "unprotected_gqa7_softcap": Shape(Model(14, 2, 24, 5, 32, softcap=4.0), tokens=165, later=293),
    "ragged_63_new_tokens_5_heads": Shape(Model(5, 5, 20, 7, 32), tokens=191, later=254, keep=3),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
some_shapes = pytest.mark.parametrize("shape", list(SHAPES.values())[2:], ids=list(SHAPES)[2:])
granularities = pytest.mark.parametrize("moves_tokens", [False, True], ids=["block", "token"])


def policies_where(holds: Callable[[Policy], bool]) -> pytest.MarkDecorator:
    cases = []
    for name, parameters in policies():
        policy = registry.create(name, parameters)
        if holds(policy):
            title = "-".join([name, *(f"{key}={value}" for key, value in parameters.items())])
            cases.append(pytest.param(policy, id=title))
    return pytest.mark.parametrize("policy", cases)


policies_ = policies_where(lambda policy: True)


def request(shape: Shape, seed: int = 0, **kwargs: Any) -> Request:
    return Request.random(shape.model, shape.later, seed=seed, protected=shape.protected, **kwargs)


def cache_of(
    shape: Shape,
    policy: Policy,
    moves_tokens: bool,
    implementation: str = "reference",
    **kwargs: Any,
) -> Cache:
    return Cache(
        shape.model, policy, operators(implementation), moves_tokens=moves_tokens, **kwargs
    )


def grow(cache: Cache, *batch: tuple[Request, int]) -> None:
    """A prefill in chunks of 100 tokens, then one token at a time for the last three."""
    for chunk, rest in ((100, 3), (1, 0)):
        while step := [
            (request, min(chunk, tokens - rest - request.num_tokens))
            for request, tokens in batch
            if request.num_tokens < tokens - rest
        ]:
            cache.step(*step)


def two_evictions(cache: Cache, shape: Shape, request: Request) -> list[Tensor]:
    """Scores [layers, kv_heads, units] of both."""
    scores = []
    for tokens in (shape.tokens, shape.later):
        grow(cache, (request, tokens))
        scores.append(cache.evict(request, shape.keep))
    return scores


@functools.cache
def scores_of(
    shape: Shape, policy: Policy, moves_tokens: bool, implementation: str = "reference"
) -> list[Tensor]:
    """`two_evictions` of the request that most tests ask about."""
    cache = cache_of(shape, policy, moves_tokens, implementation)
    return two_evictions(cache, shape, request(shape))


def assert_scores_fit(shape: Shape, moves_tokens: bool, scores: list[Tensor]) -> None:
    """Finite float32 numbers, one for each unit of each layer and head."""
    ends = [(t - shape.model.window) // shape.model.block_size for t in (shape.tokens, shape.later)]
    blocks = [ends[0] - shape.protected, shape.keep + ends[1] - ends[0]]
    for found, count in zip(scores, blocks, strict=True):
        units = count * (shape.model.block_size if moves_tokens else 1)
        assert found.shape == (shape.model.layers, shape.model.kv_heads, units)
        assert found.dtype == torch.float32
        assert found.isfinite().all()


@shapes
@granularities
@policies_
def test_scores_are_finite_and_one_for_each_unit_of_each_layer_and_head(
    shape: Shape, moves_tokens: bool, policy: Policy
) -> None:
    assert_scores_fit(shape, moves_tokens, scores_of(shape, policy, moves_tokens))


@some_shapes
@granularities
@policies_
def test_scores_from_the_cpp_operators_are_as_well(
    shape: Shape, moves_tokens: bool, policy: Policy
) -> None:
    assert_scores_fit(shape, moves_tokens, scores_of(shape, policy, moves_tokens, "cpu"))


@shapes
@granularities
@policies_
def test_scores_depend_on_nothing_but_the_request(
    shape: Shape, moves_tokens: bool, policy: Policy
) -> None:
    """Not on where its blocks lie, nor on the bytes of free blocks, of slots that are not written
    yet, and of what is kept beside them."""
    cache = cache_of(shape, policy, moves_tokens, id_seed=1, poison=3.0)
    found = two_evictions(cache, shape, request(shape))
    assert all(map(torch.equal, found, scores_of(shape, policy, moves_tokens)))


@some_shapes
@granularities
@policies_
def test_the_same_request_scores_the_same_again(
    shape: Shape, moves_tokens: bool, policy: Policy
) -> None:
    found = two_evictions(cache_of(shape, policy, moves_tokens), shape, request(shape))
    assert all(map(torch.equal, found, scores_of(shape, policy, moves_tokens)))


@some_shapes
@granularities
@policies_
def test_scores_from_the_cpp_operators_depend_on_nothing_else_either(
    shape: Shape, moves_tokens: bool, policy: Policy
) -> None:
    cache = cache_of(shape, policy, moves_tokens, "cpu", id_seed=1, poison=3.0)
    found = two_evictions(cache, shape, request(shape))
    assert all(map(torch.equal, found, scores_of(shape, policy, moves_tokens, "cpu")))


@some_shapes
@granularities
@policies_
def test_a_request_in_a_batch_scores_as_it_does_alone(
    shape: Shape, moves_tokens: bool, policy: Policy
) -> None:
    """Three requests of different lengths share steps and a cache. They are evicted in turn, the
    second time in another order."""

    def lengths(event: int) -> list[int]:
        return [(shape.tokens, shape.later)[event] - 3 * i for i in range(3)]

    def three() -> list[Request]:
        return [request(shape, seed=i, slot=i, key=i) for i in range(3)]

    alone = {}
    for i, single in enumerate(three()):
        cache = cache_of(shape, policy, moves_tokens)
        for event in range(2):
            grow(cache, (single, lengths(event)[i]))
            alone[event, i] = cache.evict(single, shape.keep)
    cache, batch = cache_of(shape, policy, moves_tokens, id_seed=2), three()
    for event, order in enumerate(((0, 1, 2), (2, 0, 1))):
        grow(cache, *zip(batch, lengths(event), strict=True))
        for i in order:
            assert torch.equal(cache.evict(batch[i], shape.keep), alone[event, i])
        for one in batch:
            cache.check(one)


@shapes
@granularities
@policies_
def test_scoring_changes_nothing_that_it_reads(
    shape: Shape, moves_tokens: bool, policy: Policy
) -> None:
    """The cache, and the attention that is accumulated beside it."""
    cache = cache_of(shape, policy, moves_tokens)
    asked = request(shape)
    grow(cache, (asked, shape.tokens))
    before = cache.snapshot()
    cache.observe(asked, shape.keep)
    assert all(map(same_bits, cache.snapshot(), before))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN included."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@shapes
@pytest.mark.parametrize("scope", ["head", "layer", "all"])
@policies_
def test_the_best_tokens_stay_in_order(shape: Shape, scope: str, policy: Policy) -> None:
    """By the scores of each head, or by what heads, or layers and heads, agree on; beside them all
    protected and recent tokens. Twice: the second time out of survivors."""
    cache = cache_of(shape, policy, True, scope=scope)
    asked = request(shape)
    for tokens in (shape.tokens, shape.later):
        grow(cache, (asked, tokens))
        cache.evict(asked, shape.keep)
        cache.check(asked)
        assert (asked.held.diff() > 0).all()
        if scope == "all":
            assert (asked.held == asked.held[:1, :1]).all()
        elif scope == "layer":
            assert (asked.held == asked.held[:, :1]).all()


@shapes
@policies_
def test_the_best_blocks_stay(shape: Shape, policy: Policy) -> None:
    cache = cache_of(shape, policy, False)
    asked = request(shape)
    two_evictions(cache, shape, asked)
    cache.check(asked)


@shapes
@granularities
@policies_
def test_a_budget_of_all_keeps_every_byte(shape: Shape, moves_tokens: bool, policy: Policy) -> None:
    cache = cache_of(shape, policy, moves_tokens)
    asked = request(shape)
    grow(cache, (asked, shape.tokens))
    before, held = cache.snapshot(), asked.held
    cache.evict(asked, keep=len(cache.selection(asked, 0).candidates[0]))
    assert torch.equal(asked.held, held)
    assert all(map(same_bits, cache.snapshot(), before))


@shapes
@granularities
@policies_
def test_combined_scores_are_one_for_each_unit(
    shape: Shape, moves_tokens: bool, policy: Policy
) -> None:
    scores = scores_of(shape, policy, moves_tokens)[1]
    by_layer, by_all = policy.combine(scores), policy.combine(scores.flatten(0, 1))
    assert by_layer.shape == (shape.model.layers, scores.shape[-1])
    assert by_all.shape == scores.shape[-1:]
    assert by_layer.isfinite().all()
    assert by_all.isfinite().all()


@shapes
@granularities
@policies_where(lambda policy: policy.needs.history)
def test_what_is_remembered_stays_with_its_token(
    shape: Shape, moves_tokens: bool, policy: Policy
) -> None:
    """At the second eviction a policy gets back the history of exactly what stayed at the first;
    everything else starts at zero."""
    cache = cache_of(shape, policy, moves_tokens)
    asked = request(shape)
    grow(cache, (asked, shape.tokens))
    candidates = cache.selection(asked, shape.keep).candidates[0]
    cache.evict(asked, shape.keep)
    assert cache.watched.view.history is not None
    history = cache.watched.view.history.clone()
    if moves_tokens:
        kept = cache.best(shape.keep * shape.model.block_size)
    else:
        places = [place for place, block in enumerate(candidates) if asked.table[block]]
        kept = torch.tensor(places).expand(*history.shape[:2], -1)
    grow(cache, (asked, shape.later))
    cache.evict(asked, shape.keep)
    expected = torch.zeros_like(cache.watched.past)
    expected[..., : kept.shape[-1]] = history.gather(-1, kept)
    assert torch.equal(cache.watched.past, expected)


@shapes
@granularities
@policies_where(lambda policy: not (policy.needs.paged or policy.needs.seeded))
def test_evictions_before_do_not_count_without_history(
    shape: Shape, moves_tokens: bool, policy: Policy
) -> None:
    """What needs neither history nor attention mass judges survivors as if they had always been
    alone: a request that starts with them scores the same. (`random` draws anew each time.)"""
    cache = cache_of(shape, policy, moves_tokens)
    asked = request(shape)
    grow(cache, (asked, shape.tokens))
    cache.evict(asked, shape.keep)
    grow(cache, (asked, shape.later))
    at = asked.held[..., None].expand(-1, -1, -1, shape.model.head_dim)
    live = asked.held.shape[-1]
    fresh = replace(
        asked,
        keys=asked.keys.gather(2, at),
        values=asked.values.gather(2, at),
        queries=asked.queries[:, :, -live:],
        table=[],
        num_tokens=0,
        survivors=0,
        events=0,
        held=torch.empty(0, 0, 0, dtype=torch.int64),
    )
    other = cache_of(shape, policy, moves_tokens, id_seed=3)
    grow(other, (fresh, live))
    second = scores_of(shape, policy, moves_tokens)[1]
    assert torch.equal(other.evict(fresh, shape.keep), second)


def test_every_registered_policy_is_here() -> None:
    here = {name for name, _ in policies()}
    assert here == set(registry.names())
    assert {"gkv", "h2o", "knorm", "random", "recency", "rkv", "snapkv", "streaming_llm"} <= here


def test_what_is_no_live_token_is_nan_here() -> None:
    """So the tests above would notice if it were read."""
    shape = SHAPES["ragged_63_new_tokens_5_heads"]
    cache = cache_of(shape, registry.create("knorm", {}), True)
    asked = request(shape)
    grow(cache, (asked, shape.tokens))
    for layer in cache.layers:
        assert layer.kv_cache[cache.free].isnan().all()
        assert layer.kv_cache[asked.table[-1]].isnan().any()
        assert layer.kv_cache[asked.table[:-1]].isfinite().all()
