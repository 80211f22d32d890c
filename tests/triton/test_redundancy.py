# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Redundancy, and the score that it is mixed into, against the policy in torch; ragged batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from gkv_vllm.triton_kernels.redundancy import mix_scores, redundancy, superseded
from gkv_vllm.triton_kernels.requests import flat
from torch import Tensor

from gkv_vllm.ops import reference
from gkv_vllm.ops.triton import TritonOps
from gkv_vllm.policies.gkv import GKV, VARIANTS
from tests.triton.requests import Shape, World

SHAPES = {
    "qwen3": Shape(head_dim=128, window=16),
    "ragged_5_heads": Shape(kv_heads=5, layers=1, dtype=torch.float32),
    "d96_blocks_of_32": Shape(
        ((83, 0, 0), (170, 1, 2)), head_dim=96, block_size=32, dtype=torch.float16
    ),
    "cpu_layout_d256": Shape(((63, 0, 1), (130, 2, 2)), kv_heads=1, head_dim=256, layout="cpu"),
    "hnd_two_groups": Shape(((63, 0, 0), (130, 1, 3)), tables=2, layers=3, layout="HND"),
    "odd_blocks": Shape(((100, 0, 0), (193, 1, 2)), window=1, block_size=48),
    "blocks_of_128": Shape(((150, 0, 0), (300, 1, 1)), layers=1, block_size=128),
}
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request: pytest.FixtureRequest) -> Shape:
    return request.param


def unprotected(world: World, request: int) -> Tensor:
    """[layers, kv_heads, tokens, head_dim]"""
    view = world.view(request, 1)
    return view.keys()[..., view.protected :, :]


def plant(world: World) -> None:
    """Multiples of other keys, near and far away; one of the copies is zero."""
    for request, (live, protected, _) in enumerate(world.shape.requests):
        first = protected * world.shape.block_size
        plan = [
            (first, live - 1, 1.0),
            (first + 2, first + 3, 0.5),
            (first + 5, first + 6, 0.0),
            (first, live - 9, 0.25),
        ]
        for layer, which in enumerate(world.table_of_layer.tolist()):
            keys = world.layers().keys[layer]
            for source, target, factor in plan:
                block, slot = divmod(source, world.shape.block_size)
                copied = keys[int(world.tables[which, request, block]), :, slot] * factor
                block, slot = divmod(target, world.shape.block_size)
                keys[int(world.tables[which, request, block]), :, slot] = copied


def make_the_window_most_redundant(world: World) -> None:
    """Its first key becomes the mean, which all resemble; columns lose later ones."""
    for request, (live, _, _) in enumerate(world.shape.requests):
        mean = unprotected(world, request).float().mean(-2)
        block, slot = divmod(live - world.shape.window, world.shape.block_size)
        for layer, which in enumerate(world.table_of_layer.tolist()):
            keys = world.layers().keys[layer]
            keys[int(world.tables[which, request, block]), :, slot] = mean[layer].to(keys.dtype)


def gap_around(world: World, threshold: float) -> tuple[float, float]:
    """The two neighbouring cosines with the widest gap between, close to the threshold."""
    cosines = []
    for request in range(len(world.shape.requests)):
        unit = torch.nn.functional.normalize(unprotected(world, request).double(), dim=-1)
        cosines.append((unit @ unit.transpose(-1, -2)).flatten().cpu())
    near = torch.cat(cosines)
    near = near[(near - threshold).abs() < 0.05]
    near = torch.cat([near, torch.tensor([threshold - 0.05, threshold + 0.05])]).sort().values
    widest = near.diff().argmax()
    return near[widest].item(), near[widest + 1].item()


def tolerance(shape: Shape) -> float:
    """Absolute, of a mean of cosines: each sums head_dim products whose magnitudes sum up to 1."""
    return 4 * shape.head_dim**0.5 * EPSILON


@pytest.mark.parametrize("within_blocks", [False, True], ids=["all_keys", "within_blocks"])
@pytest.mark.parametrize("similar", [0.0, 1.0, 3.0], ids=["distinct", "mixed", "alike"])
def test_redundancy_is_the_references(
    shape: Shape, device: torch.device, similar: float, within_blocks: bool
) -> None:
    world = World(shape, device, similar=similar)
    plant(world)
    # No cosine may lie so close to the threshold that rounding decides.
    below, above = gap_around(world, 0.5)
    assert above - below > 2 * tolerance(shape)
    threshold = (below + above) / 2
    actual = redundancy(
        world.layers(), world.due(), threshold=threshold, within_blocks=within_blocks
    )
    for request, got in enumerate(actual):
        keys = unprotected(world, request)
        if within_blocks:
            expected = reference.redundancy_in_block(keys, shape.block_size, threshold)
        else:
            expected = reference.redundancy(keys, threshold)
        assert got.shape == expected.shape
        assert torch.isfinite(got).all()
        assert torch.allclose(got, expected, rtol=0, atol=tolerance(shape))


def test_what_columns_lose_does_not_depend_on_the_batch(device: torch.device) -> None:
    world = World(Shape(layers=1), device, similar=1.0)
    together = redundancy(world.layers(), world.due())
    for i, request in enumerate(world.shape.requests):
        alone = World(replace(world.shape, requests=(request,)), device)
        alone.caches, alone.tables = world.caches, world.tables[:, i : i + 1].contiguous()
        (scores,) = redundancy(alone.layers(), alone.due())
        assert torch.equal(scores, together[i])


@pytest.mark.parametrize("similar", [0.0, 3.0], ids=["distinct", "alike"])
def test_what_is_superseded_is_the_references(
    shape: Shape, device: torch.device, similar: float
) -> None:
    world = World(shape, device, similar=similar)
    plant(world)
    for cache in world.caches.kv_caches:
        cache.nan_to_num_(nan=1.0)  # a maximum drops NaN
    kernels = TritonOps(world.caches.layout).bind(world.caches)
    for request, got in enumerate(superseded(world.layers(), world.due())):
        expected = reference.superseded(unprotected(world, request))
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, rtol=0, atol=tolerance(shape))
        assert (got[..., -1] == 0).all()
        view = world.view(request, 1)
        alone = kernels.superseded(view.block_ids, view.protected, view.live_tokens)
        assert torch.equal(alone, got)


@pytest.mark.parametrize("redundancy", ["exact", "none"])
def test_of_each_request_its_own_passages_are_restated(
    device: torch.device, redundancy: Literal["exact", "none"]
) -> None:
    world = World(Shape(((63, 0, 0), (130, 1, 0))), device, similar=1.0)
    policy = GKV(redundancy=redundancy, restated=0.2)
    formula, views = policy.global_score(), world.views(1)
    assert formula is not None
    kernels = TritonOps(world.caches.layout).bind(world.caches)
    for view, got in zip(views, kernels.global_scores(formula, views, None), strict=True):
        past = torch.zeros(view.num_layers, view.kv_heads, view.num_units, device=device)
        scored = replace(view, history=policy.update(replace(view, history=past)))
        expected = policy.score(scored)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        assert (replace(policy, restated=1.0).score(scored) > expected + 0.05).any()


POLICIES = {
    "paper": GKV(),
    "mostly_redundancy_cold": GKV(score_weight=0.1, temperature=0.05),
    "zipage": GKV(variant="zipage"),
}


@pytest.mark.parametrize("per_block", [False, True], ids=["tokens", "blocks"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_mixed_scores_are_the_policys(
    shape: Shape, device: torch.device, policy: GKV, per_block: bool
) -> None:
    world = World(shape, device, similar=1.0)
    make_the_window_most_redundant(world)
    unit = shape.block_size if per_block else 1
    importance = [
        torch.rand(
            shape.layers, shape.kv_heads, world.candidates(i) // unit, generator=world.generator
        ).to(device)
        for i in range(len(shape.requests))
    ]
    views = world.views(unit, importance)
    variant = VARIANTS[policy.variant]
    temperature = policy.temperature or variant.temperature
    within_blocks = variant.redundancy == "block"
    similar = [
        view.ops.redundancy(view.block_ids, view.protected, view.live_tokens, 0.5, within_blocks)
        for view in views
    ]
    if shape.window > 1 and not within_blocks:
        older = [part[..., : -shape.window].amax() for part in similar]
        assert any(part.amax() > most for part, most in zip(similar, older, strict=True))
    actual = mix_scores(
        importance,
        similar,
        world.due(unit),
        score_weight=policy.score_weight or variant.score_weight,
        temperature=temperature,
        unit=unit,
        normalised=variant.normalised,
    )
    # Exponents are off by an epsilon of their size, at most 1 / temperature; numbers are at most 1.
    atol = EPSILON * (2 / temperature + 8)
    for got, view in zip(actual, views, strict=True):
        assert torch.allclose(got, policy.score(view), rtol=0, atol=atol)


def test_what_redundancy_returns_is_mixed_without_a_copy(device: torch.device) -> None:
    world = World(Shape(layers=1, head_dim=128), device)
    below, above = gap_around(world, 0.5)
    assert below < 0.5 - tolerance(world.shape) and above > 0.5 + tolerance(world.shape)
    due = world.due()
    similar = redundancy(world.layers(), due)
    assert flat("redundancy", similar, due.unprotected, 1, 2) is similar[0]
    importance = [torch.rand(1, 2, count).to(device) for count in due.num_candidates]
    actual = mix_scores(importance, similar, due, score_weight=0.5, temperature=1.0, unit=1)
    for got, view in zip(actual, world.views(1, importance), strict=True):
        assert torch.allclose(got, GKV().score(view), rtol=0, atol=2 * tolerance(world.shape))


def test_without_redundancy_the_importance_is_the_score(device: torch.device) -> None:
    due = World(Shape(), device).due()
    importance = [torch.rand(2, 2, count).to(device) for count in due.num_candidates]
    settings = {"temperature": 1.0, "unit": 1}
    for scores in (
        mix_scores(importance, None, due, score_weight=0.5, **settings),
        mix_scores(importance, importance, due, score_weight=1.0, **settings),
    ):
        assert all(a is b for a, b in zip(scores, importance, strict=True))


def test_parts_of_other_lengths_are_refused_by_name(device: torch.device) -> None:
    due = World(Shape(), device).due()
    importance = [torch.rand(2, 2, count).to(device) for count in due.num_candidates]
    with pytest.raises(ValueError, match="redundancy must be float32 of shapes"):
        mix_scores(importance, importance, due, score_weight=0.5, temperature=1.0, unit=1)
    with pytest.raises(ValueError, match="unit must be 1 or the block size 16"):
        mix_scores(importance, importance, due, score_weight=0.5, temperature=1.0, unit=4)
