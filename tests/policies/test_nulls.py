# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The policies that judge by place alone: exactly what `recency` and `streaming_llm` keep, and on
what a draw of `random` depends."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gkv_vllm.policies.base import Needs, Policy
from gkv_vllm.policies.random import Random
from gkv_vllm.policies.recency import Recency
from gkv_vllm.policies.streaming_llm import StreamingLLM
from gkv_vllm.policies.view import View

from .paged_requests import Cache, Model, Request, operators

MODEL = Model(query_heads=2, kv_heads=2, head_dim=4, window=3, block_size=4)
"""Of 32 tokens the last 4 stay: 3 of the window, and one that shares a block with them."""


def start(policy: Policy, *, moves_tokens: bool, protected: int = 0) -> tuple[Cache, Request]:
    cache = Cache(MODEL, policy, operators("reference"), moves_tokens=moves_tokens)
    request = Request.random(MODEL, 64, protected=protected)
    cache.step((request, 32))
    return cache, request


def evict(cache: Cache, request: Request, keep: int) -> list[int]:
    """What every layer and head then holds of what may go."""
    units = len(cache.selection(request, keep).candidates[0])
    cache.evict(request, keep)
    cache.check(request)
    assert (request.held == request.held[:1, :1]).all()
    first = request.protected * MODEL.block_size
    assert units > keep
    return request.held[0, 0, first : first + keep * MODEL.block_size].tolist()


@pytest.mark.parametrize("moves_tokens", [False, True], ids=["block", "token"])
def test_recency_keeps_the_newest(moves_tokens: bool) -> None:
    cache, request = start(Recency(), moves_tokens=moves_tokens)
    assert evict(cache, request, keep=2) == [*range(20, 28)]
    cache.step((request, 12))
    assert evict(cache, request, keep=3) == [*range(28, 40)]


def test_recency_keeps_what_is_protected() -> None:
    cache, request = start(Recency(), moves_tokens=True, protected=2)
    evict(cache, request, keep=1)
    assert request.held[0, 0].tolist() == [*range(8), *range(24, 32)]


def test_streaming_llm_keeps_the_first_tokens_and_the_newest() -> None:
    cache, request = start(StreamingLLM(), moves_tokens=True)
    assert evict(cache, request, keep=2) == [*range(4), *range(24, 28)]
    cache.step((request, 12))
    assert evict(cache, request, keep=3) == [*range(4), *range(32, 40)]


def test_streaming_llm_counts_sinks_in_tokens() -> None:
    cache, request = start(StreamingLLM(sinks=3), moves_tokens=True)
    assert evict(cache, request, keep=2) == [0, 1, 2, *range(23, 28)]


@pytest.mark.parametrize("sinks, blocks", [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_a_block_with_a_sink_is_one(sinks: int, blocks: int) -> None:
    cache, request = start(StreamingLLM(sinks=sinks), moves_tokens=False)
    first_kept = 28 - 4 * (3 - blocks)
    assert evict(cache, request, keep=3) == [*range(4 * blocks), *range(first_kept, 28)]


@pytest.mark.parametrize("moves_tokens", [False, True], ids=["block", "token"])
@pytest.mark.parametrize("protected, unprotected_sinks", [(0, 6), (1, 2), (2, 0)])
def test_protected_tokens_count_as_sinks(
    moves_tokens: bool, protected: int, unprotected_sinks: int
) -> None:
    cache, request = start(StreamingLLM(6), moves_tokens=moves_tokens, protected=protected)
    first = 4 * protected
    sinks = unprotected_sinks if moves_tokens else 4 * -(-unprotected_sinks // 4)
    newest = range(28 - (12 - sinks), 28)
    assert evict(cache, request, keep=3) == [*range(first, first + sinks), *newest]


@pytest.mark.parametrize("moves_tokens", [False, True], ids=["block", "token"])
def test_of_too_many_sinks_the_newest_stay(moves_tokens: bool) -> None:
    """As with everything else, the order is by age: what the sinks leave no room for goes."""
    cache, request = start(StreamingLLM(sinks=12), moves_tokens=moves_tokens)
    assert evict(cache, request, keep=2) == [*range(4, 12)]


def test_streaming_llm_refuses_fewer_than_no_sinks() -> None:
    with pytest.raises(ValueError, match="sinks must not be negative, got -1"):
        StreamingLLM(sinks=-1)


# ---- random


def a_view(moves_tokens: bool = True) -> View:
    cache, request = start(Random(), moves_tokens=moves_tokens)
    return cache.observe(request, keep=2)


def draw(seed: int = 0, **changed: Any) -> Tensor:
    return Random(seed=seed).score(replace(a_view(), **changed))


def test_random_repeats_for_the_same_request() -> None:
    assert torch.equal(draw(), draw())


@pytest.mark.parametrize("changed", [{"seed": 1}, {"key": 8}, {"event": 1}], ids=str)
def test_random_depends_on_seed_request_and_event(changed: dict[str, int]) -> None:
    assert not torch.isin(draw(**changed), draw()).any()


def test_random_draws_do_not_disturb_each_other_or_torch() -> None:
    view, torch_state = a_view(), torch.get_rng_state()
    first = Random().score(view)
    for other in range(20):
        Random().score(replace(view, key=other))
    assert torch.equal(Random().score(view), first)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_every_layer_and_head_draws_for_itself() -> None:
    rows = draw().flatten(0, 1)
    assert len(rows.unique()) == rows.numel()


@pytest.mark.parametrize("heads", [1, 2])
def test_ranks_draw_what_one_rank_draws(heads: int) -> None:
    """The heads of a model of six, dealt out."""

    def of_rank(first: int) -> View:
        view = a_view()
        view.ops.caches = replace(
            view.ops.caches,
            kv_caches=tuple(x[:, :heads] for x in view.ops.caches.kv_caches),
            first_head=first,
            model_heads=6,
        )
        return view

    ranks = [Random().score(of_rank(first)) for first in range(0, 6, heads)]
    assert all(scores.shape[1] == heads for scores in ranks)
    together = torch.cat(ranks, 1)
    assert len(together.unique()) == together.numel()
    assert torch.equal(together[:, 3:4], Random().score(of_rank(3))[:, :1])
    view = a_view()
    view.ops.caches = replace(
        view.ops.caches, kv_caches=tuple(x.repeat(1, 3, 1, 1) for x in view.ops.caches.kv_caches)
    )
    assert torch.equal(together, Random().score(view))


@pytest.mark.parametrize("scope", ["head", "layer", "all"])
def test_random_keeps_every_unit_equally_often(scope: str) -> None:
    """In every layer and head, and where they share a kept set."""
    draws, keep, view = 2000, 3, a_view(moves_tokens=False)
    kept: Counter[tuple[int, ...]] = Counter()
    for key in range(draws):
        scores = Random().score(replace(view, key=key))
        if scope == "layer":
            scores = Random().combine(scores)[:, None]
        elif scope == "all":
            scores = Random().combine(scores.flatten(0, 1))[None, None]
        for layer, heads in enumerate(scores.topk(keep).indices.tolist()):
            for head, units in enumerate(heads):
                kept.update((layer, head, unit) for unit in units)
    share = keep / view.num_units
    assert len(kept) == scores.numel()
    # Six standard deviations of a binomial count.
    tolerance = 6 * (draws * share * (1 - share)) ** 0.5
    assert all(abs(count - draws * share) < tolerance for count in kept.values())


def survivors(policy: Random, keys: int) -> Tensor:
    """How often each of 18 units is among 4 kept, after 3 evictions with 8, 12 and 18 seen.

    [units], of the first layer and head."""
    kept_often, kept, seen_first = torch.zeros(18), 4, a_view()
    for key in range(keys):
        history, held = torch.zeros(1, 1, 0), torch.arange(0)
        for event, (past, seen) in enumerate(pairwise((0, 8, 12, 18))):
            new = torch.arange(past, seen)
            units = torch.cat([held, new])
            view = replace(
                seen_first, key=key, event=event, num_candidates=len(units), remembered=len(held),
                history=torch.nn.functional.pad(history, (0, len(new))).expand(2, 2, -1),
            )  # fmt: skip
            if policy.needs.history:
                view = replace(view, history=policy.update(view))
            scores = policy.score(view)[:1, :1]
            chosen = scores.flatten().topk(kept).indices.sort().values
            assert view.history is not None
            history, held = view.history[:1, :1, chosen], units[chosen]
        kept_often[held] += 1
    return kept_often / keys


def test_one_draw_for_life_keeps_a_uniform_sample_of_all_that_was() -> None:
    draws, share = 600, 4 / 18
    tolerance = 6 * (share * (1 - share) / draws) ** 0.5
    once, again = survivors(Random(redraw=False), draws), survivors(Random(), draws)
    assert (once - share).abs().max() < tolerance
    # Redrawn, the oldest survive 4/8, 4/8 and 4/10 of the time.
    assert (again[:8] - 0.5 * 0.5 * 0.4).abs().max() < tolerance
    assert (again[12:] - 0.4).abs().max() < tolerance


@pytest.mark.parametrize(
    "policy, needs",
    [
        (Recency(), Needs()),
        (StreamingLLM(), Needs()),
        (Random(), Needs(seeded=True)),
        (Random(redraw=False), Needs(seeded=True, history=True)),
    ],
    ids=["recency", "streaming_llm", "random", "random once"],
)
def test_policies_by_place_cost_nothing(policy: Policy, needs: Needs) -> None:
    assert policy.needs == needs
