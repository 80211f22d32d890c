# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Each policy against its formula, written out over dense tokens one layer and KV head at a time.

At a request's first and second eviction, in both granularities, with protected tokens and with
recent ones that are no candidates. `ops/reference.py` is trusted here (tests/ops/test_reference.py
holds it against loops); no part of the policies or of the view is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gkv_vllm.ops import reference
from gkv_vllm.policies.base import Policy
from gkv_vllm.policies.gkv import GKV
from gkv_vllm.policies.h2o import H2O
from gkv_vllm.policies.knorm import KNorm
from gkv_vllm.policies.rkv import RKV
from gkv_vllm.policies.snapkv import SnapKV

from .paged_requests import IMPLEMENTATIONS, Cache, Model, Request, operators

EPS = torch.finfo(torch.float32).eps
MODELS = {
    "gqa7_softcap": Model(14, 2, head_dim=24, window=5, block_size=32, softcap=4.0),
    "ragged_5_heads": Model(5, 5, 20, window=7, block_size=32),
}


@dataclass(frozen=True)
class Head:
    """What one layer and KV head holds, and where its candidates are."""

    keys: Tensor
    """[live tokens, head_dim]"""
    queries: Tensor
    """[query group, window, head_dim]"""
    past: Tensor
    """[units]; 0 without history."""
    is_new: Tensor
    """[units] bool"""
    mass: Tensor
    """[live tokens]: attention from all queries so far."""
    model: Model
    protected: int
    candidates: int
    unit: int
    keep: int
    event: int

    def local(self, form: str) -> Tensor:
        """Of the tokens older than the window."""
        model = self.model
        return reference.local_scores(
            self.queries, self.keys[None], model.scale, model.softcap, form
        )[0]

    def redundancy(self, temperature: float = 1.0, block_size: int | None = None) -> Tensor:
        """Of the unprotected tokens older than the window."""
        keys = self.keys[self.protected :]
        found = (
            reference.redundancy(keys, 0.5)
            if block_size is None
            else reference.redundancy_in_block(keys, block_size, 0.5)
        )
        shares = (found / temperature).exp()
        return (shares / shares.sum())[: len(self.keys) - self.protected - self.model.window]

    def units(self, per_token: Tensor, reduce: Callable[[list[float]], float]) -> Tensor:
        """Of the candidates, out of numbers for all tokens from the first on."""
        numbers = per_token[self.protected : self.protected + self.candidates].tolist()
        starts = range(0, self.candidates, self.unit)
        return torch.tensor([reduce(numbers[i : i + self.unit]) for i in starts])

    def unprotected_units(self, numbers: Tensor, reduce: Callable[[list[float]], float]) -> Tensor:
        """The same out of numbers for the unprotected tokens."""
        return self.units(torch.cat([torch.zeros(self.protected), numbers]), reduce)


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def pooled(numbers: Tensor, kernel: int, reduce: Callable[[list[float]], float]) -> Tensor:
    """Beyond the ends there is nothing: it never is the maximum, and is 0 in a sum."""
    row, side = numbers.tolist(), kernel // 2
    return torch.tensor([reduce(row[max(0, i - side) : i + side + 1]) for i in range(len(row))])


def gkv(head: Head, history: str = "max", alpha: float = 0.8, weight: float = 0.5) -> Tensor:
    local = head.local("max_probability")
    present = head.units(local / local.max(), max)
    old = torch.where(head.is_new, present, head.past) if history == "mean" else head.past
    if history == "max":
        importance = torch.maximum(alpha * old, present)
    elif history == "mean":
        importance = alpha * old + (1 - alpha) * present
    else:
        importance = alpha * old + present
    redundancy = head.redundancy()
    return weight * importance - (1 - weight) * head.unprotected_units(
        redundancy / redundancy.max(), mean
    )


def zipage(head: Head, weight: float = 0.2, temperature: float = 0.4) -> Tensor:
    local = head.local("max_probability")
    if head.event == 0:
        importance = head.units(pooled(local, 5, max), max)
    else:
        importance = torch.maximum(0.8 * head.past, head.units(local, max))
    redundancy = head.redundancy(temperature, head.model.block_size)
    return weight * importance - (1 - weight) * head.unprotected_units(redundancy, mean)


def rkv(head: Head, form: str, kernel: int, weight: float) -> Tensor:
    attention = head.units(pooled(head.local(form), kernel, max), max)
    return weight * attention - (1 - weight) * head.unprotected_units(head.redundancy(), mean)


def snapkv(head: Head, form: str, kernel: int) -> Tensor:
    return head.units(pooled(head.local(form), kernel, max), max)


def kvpress_snapkv(head: Head) -> Tensor:
    by_window = pooled(head.local("mean_probability"), 5, lambda numbers: sum(numbers) / 5)
    return head.units(by_window, max)


def knorm(head: Head) -> Tensor:
    return head.units(-head.keys.square().sum(-1).sqrt(), mean)


def h2o(head: Head, recent_ratio: float) -> Tensor:
    """Units by the sum of their tokens; those of which all tokens are among the recent share of the
    tokens that stay are above all, whatever they scored."""
    mass = head.units(head.mass, sum)
    above = mass.max() + 1
    end = len(head.keys)
    stay = end - head.protected - head.candidates + head.keep * head.unit
    for unit in range(len(mass)):
        first_token = head.protected + unit * head.unit
        if end - first_token <= recent_ratio * stay:
            mass[unit] = above
    return mass


FORMULAS: dict[str, tuple[Policy, Callable[..., Tensor], dict[str, Any]]] = {
    "gkv": (GKV(), gkv, {}),
    "gkv_parameters": (GKV(alpha=0.6, score_weight=0.3), gkv, {"alpha": 0.6, "weight": 0.3}),
    "gkv_mean": (GKV(history="mean"), gkv, {"history": "mean"}),
    "gkv_sum": (GKV(history="sum"), gkv, {"history": "sum"}),
    "gkv_attention_only": (GKV(redundancy="none"), gkv, {"weight": 1.0}),
    "gkv_redundancy_only": (GKV(score_weight=0.0), gkv, {"weight": 0.0}),
    "zipage": (GKV(variant="zipage"), zipage, {}),
    "zipage_parameters": (
        GKV(variant="zipage", score_weight=0.6, temperature=2.0),
        zipage,
        {"weight": 0.6, "temperature": 2.0},
    ),
    "rkv": (RKV(), rkv, {"form": "max_logit", "kernel": 7, "weight": 0.07}),
    "rkv_gkv": (
        RKV(variant="gkv"),
        rkv,
        {"form": "max_probability", "kernel": 5, "weight": 0.1},
    ),
    "rkv_parameters": (
        RKV(kernel=3, score_weight=0.9),
        rkv,
        {"form": "max_logit", "kernel": 3, "weight": 0.9},
    ),
    "snapkv": (SnapKV(), snapkv, {"form": "max_logit", "kernel": 7}),
    "snapkv_gkv": (SnapKV(variant="gkv"), snapkv, {"form": "max_probability", "kernel": 5}),
    "snapkv_kvpress": (SnapKV(variant="kvpress"), kvpress_snapkv, {}),
    "snapkv_kernel": (SnapKV(kernel=1), snapkv, {"form": "max_logit", "kernel": 1}),
    "knorm": (KNorm(), knorm, {}),
    "h2o": (H2O(), h2o, {"recent_ratio": 0.5}),
    "h2o_heavy_only": (H2O(recent_ratio=0.0), h2o, {"recent_ratio": 0.0}),
    "h2o_recent_only": (H2O(recent_ratio=1.0), h2o, {"recent_ratio": 1.0}),
    "h2o_eighth": (H2O(recent_ratio=1 / 8), h2o, {"recent_ratio": 1 / 8}),
}


def mass_of(request: Request, layer: int, head: int, model: Model, gone: list[Tensor]) -> Tensor:
    """One dense pass over all queries so far, each over what its head held then: the live tokens'
    sums. gone[i]: per layer and head, the positions lost at the i-th eviction, after `when[i]`."""
    group = model.query_heads // model.kv_heads
    queries = request.queries[layer, head * group : (head + 1) * group, : request.num_tokens]
    keys = request.keys[layer, head, : request.num_tokens]
    logits = (queries @ keys.T) * model.scale
    if model.softcap:
        logits = torch.tanh(logits / model.softcap) * model.softcap
    hidden = torch.ones(request.num_tokens, request.num_tokens, dtype=torch.bool).triu(1)
    for lost in gone:
        hidden |= lost[layer, head]
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    return weights.sum((0, 1))


def lost_at(request: Request, before: Tensor, total: int) -> Tensor:
    """[layers, kv_heads, queries, tokens]: queries from now on do not see what was just evicted."""
    size = (*before.shape[:2], total)
    was = torch.zeros(size, dtype=torch.bool).scatter(-1, before, True)
    stays = torch.zeros(size, dtype=torch.bool).scatter(-1, request.held, True)
    later = torch.arange(total) >= request.num_tokens
    return (was & ~stays)[..., None, :] & later[:, None]


def heads_at_each_eviction(
    cache: Cache, request: Request, keep: int, stages: tuple[int, ...]
) -> Iterator[tuple[Tensor, list[list[Head]]]]:
    """The scores found, and what each layer and head held when they were."""
    model, gone = cache.model, []
    unit = 1 if cache.moves_tokens else model.block_size
    for event, tokens in enumerate(stages):
        cache.step((request, tokens - request.num_tokens - 2))
        cache.step((request, 1))
        cache.step((request, 1))
        held = request.held
        seen = cache.selection(request, keep)
        candidates = len(seen.candidates[0]) * model.block_size
        new = torch.arange(candidates // unit) >= seen.remembered * model.block_size // unit
        scores = cache.evict(request, keep)
        group = model.query_heads // model.kv_heads
        grid = []
        for layer in range(model.layers):
            row = []
            for h in range(model.kv_heads):
                at = held[layer, h]
                mass = torch.zeros(tokens)
                if cache.watched.needs.attention_mass:
                    lost = [m[..., :tokens, :tokens] for m in gone]
                    mass = mass_of(request, layer, h, model, lost)
                heads = slice(h * group, (h + 1) * group)
                row.append(
                    Head(
                        keys=request.keys[layer, h, at],
                        queries=request.queries[layer, heads, tokens - model.window : tokens],
                        past=cache.watched.past[layer, h]
                        if cache.watched.needs.history
                        else torch.zeros(len(new)),
                        is_new=new,
                        mass=mass[at],
                        model=model,
                        protected=request.protected * model.block_size,
                        candidates=candidates,
                        unit=unit,
                        keep=keep * model.block_size // unit,
                        event=event,
                    )
                )
            grid.append(row)
        gone.append(lost_at(request, held, stages[-1]))
        yield scores, grid


def tolerance(request: Request, model: Model, policy: Policy) -> dict[str, float]:
    """Of two float32 evaluations.

    Attention: a weight is off by twice eps times the products that its logit sums (query norm times
    key norm times scale), with the maximum that it is divided by as much again. Accumulated, a sum
    rounds once for each query, head of the group and token of a block. Redundancy: a mean cosine is
    off by (head_dim + 4) eps, its exponential by as much over the temperature (0.4 at least), and
    so are the sum and the maximum that it is divided by."""
    products = model.scale * float(
        request.queries.norm(dim=-1).max() * request.keys.norm(dim=-1).max()
    )
    if policy.needs.attention_mass:
        addends = model.query_heads // model.kv_heads * request.num_tokens + model.block_size
        return {"rtol": EPS * (4 * products + 2 * addends), "atol": 0}
    return {"rtol": 0, "atol": EPS * (8 * products + 6 * (model.head_dim + 4) / 0.4)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("protected", [0, 2])
@pytest.mark.parametrize("moves_tokens", [False, True], ids=["block", "token"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("policy, formula, parameters", FORMULAS.values(), ids=FORMULAS)
def test_scores_are_the_formula_over_dense_tokens(
    policy: Policy,
    formula: Callable[..., Tensor],
    parameters: dict[str, Any],
    model: Model,
    moves_tokens: bool,
    protected: int,
    implementation: str,
) -> None:
    cache = Cache(model, policy, operators(implementation), moves_tokens=moves_tokens)
    request = Request.random(model, 254, protected=protected)
    for scores, grid in heads_at_each_eviction(cache, request, keep=2, stages=(191, 254)):
        expected = torch.stack(
            [torch.stack([formula(head, **parameters) for head in row]) for row in grid]
        )
        torch.testing.assert_close(scores, expected, **tolerance(request, model, policy))
