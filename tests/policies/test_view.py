# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What a policy sees of a request, where no policy's formula shows it (tests/policies/
test_formulas.py): dense keys, order, reductions, and errors that say what was not declared."""

from __future__ import annotations

import pytest
import torch

from gkv_vllm.policies.base import Policy
from gkv_vllm.policies.gkv import GKV
from gkv_vllm.policies.knorm import KNorm
from gkv_vllm.policies.view import View

from .paged_requests import Cache, Model, Request, operators

MODEL = Model(query_heads=5, kv_heads=5, head_dim=12, window=7, block_size=4)


def seen(policy: Policy, moves_tokens: bool) -> tuple[View, Request]:
    """A second eviction of 63 + 63 tokens, 2 blocks of them protected."""
    cache = Cache(MODEL, policy, operators("reference"), moves_tokens=moves_tokens)
    request = Request.random(MODEL, 126, protected=2)
    cache.step((request, 63))
    cache.evict(request, keep=5)
    cache.step((request, 63))
    return cache.observe(request, keep=5), request


@pytest.mark.parametrize("moves_tokens", [False, True], ids=["block", "token"])
def test_the_parts_of_a_request_add_up(moves_tokens: bool) -> None:
    view, request = seen(GKV(), moves_tokens)
    assert view.live_tokens == request.held.shape[-1]
    assert view.protected == 8
    assert view.num_candidates == view.num_units * view.unit
    recent = view.live_tokens - view.protected - view.num_candidates
    assert view.window <= recent < view.window + view.block_size
    assert view.keep * view.unit == view.remembered * view.unit == 20
    assert (view.unit, view.event, view.kv_heads) == (1 if moves_tokens else 4, 1, 5)


@pytest.mark.parametrize("moves_tokens", [False, True], ids=["block", "token"])
def test_keys_are_those_of_the_live_tokens_in_order(moves_tokens: bool) -> None:
    view, request = seen(KNorm(), moves_tokens)
    at = request.held[..., None].expand(-1, -1, -1, MODEL.head_dim)
    assert torch.equal(view.keys(), request.keys.gather(2, at))
    older = view.keys()[:, :, : -MODEL.window]
    torch.testing.assert_close(view.key_norms(), older.square().sum(-1).sqrt())


@pytest.mark.parametrize("moves_tokens", [False, True], ids=["block", "token"])
def test_order_counts_units_from_old_to_new(moves_tokens: bool) -> None:
    view, _ = seen(KNorm(), moves_tokens)
    expected = torch.arange(float(view.num_units)).expand(2, 5, -1)
    assert torch.equal(view.order(), expected)


def test_units_reduce_the_tokens_of_a_candidate_block() -> None:
    view, _ = seen(KNorm(), False)
    numbers = torch.arange(float(view.live_tokens - view.window)).expand(2, 5, -1)
    first = 8 + 4 * torch.arange(float(view.num_units)).expand(2, 5, -1)
    assert torch.equal(view.units(numbers, by="max"), first + 3)
    assert torch.equal(view.units(numbers, by="mean"), first + 1.5)
    assert torch.equal(view.units(numbers, by="sum"), 4 * first + 6)


@pytest.mark.parametrize("by", ["max", "mean", "sum"])
def test_a_token_is_its_own_unit(by: str) -> None:
    view, _ = seen(KNorm(), True)
    numbers = torch.arange(float(view.live_tokens - view.window)).expand(2, 5, -1)
    assert torch.equal(view.units(numbers, by=by), numbers[..., 8 : 8 + view.num_units])


def test_what_was_not_declared_is_named() -> None:
    view, _ = seen(KNorm(), False)
    with pytest.raises(ValueError, match=r"view\.local_scores: declare Needs\(queries=True\)"):
        view.local_scores()
    with pytest.raises(ValueError, match=r"attention_mass: declare Needs\(attention_mass=True\)"):
        view.attention_mass()


@pytest.mark.parametrize("moves_tokens", [False, True], ids=["block", "token"])
def test_an_unknown_reduction_is_named(moves_tokens: bool) -> None:
    view, _ = seen(KNorm(), moves_tokens)
    with pytest.raises(ValueError, match="unknown reduction 'median'; valid: max, mean, sum"):
        view.units(view.key_norms(), by="median")
