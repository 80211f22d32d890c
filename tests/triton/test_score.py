# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Local scores and their decayed maxima, against the policy in torch; ragged batches throughout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gkv_vllm.triton_kernels.requests import DueRequests
from gkv_vllm.triton_kernels.score import FORMS, local_scores, score_blocks, score_tokens
from torch import Tensor

from gkv_vllm.policies.gkv import GKV
from tests.triton.requests import INF, Shape, World

SHAPES = {
    "qwen3": Shape(head_dim=128, window=16),
    "ragged_5_heads_no_group": Shape(kv_heads=5, group=1, layers=1, dtype=torch.float32),
    "gqa7_d96_blocks_of_32": Shape(
        ((83, 0, 0), (170, 1, 2)), group=7, head_dim=96, block_size=32, dtype=torch.float16
    ),
    "gqa8_cpu_layout_d256": Shape(
        ((63, 0, 1), (130, 2, 2)), kv_heads=1, group=8, head_dim=256, layout="cpu", softcap=4.0
    ),
    "hnd_two_groups_softcap": Shape(tables=2, layers=3, layout="HND", softcap=20.0),
    "long_window_in_turns": Shape(((90, 1, 1), (157, 0, 0)), group=8, window=40, layers=1),
    "one_query_odd_blocks": Shape(
        ((100, 0, 0), (193, 1, 2)), group=1, window=1, block_size=48, dtype=torch.float32
    ),
}
EPSILON = torch.finfo(torch.float32).eps


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def world(request: pytest.FixtureRequest, device: torch.device) -> World:
    return World(request.param, device)


def tolerance(world: World) -> float:
    """Relative error of a probability: that of its logit, absolutely, in both computations.

    A logit sums head_dim products of at most its magnitude times a few; sums of exponentials and
    the division add some epsilons more."""
    shape = world.shape
    keys = max(k.nan_to_num().float().abs().max().item() for k in world.layers().keys)
    magnitude = keys * world.queries.float().abs().max().item() * shape.head_dim * shape.scale
    return EPSILON * (2 * magnitude + shape.softcap * 4 + 16)


def assert_close(actual: list[Tensor], expected: list[Tensor], relative: float) -> None:
    assert [x.shape for x in actual] == [x.shape for x in expected]
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.isfinite(got).all()
        assert torch.allclose(got, wanted, rtol=relative, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_local_scores_are_the_references_whatever_the_shape(world: World, form: str) -> None:
    shape = world.shape
    actual = local_scores(
        world.queries,
        world.layers(),
        world.due(),
        scale=shape.scale,
        softcap=shape.softcap,
        form=form,
    )
    expected = [view.local_scores(form) for view in world.views(1)]
    assert_close(actual, expected, tolerance(world))


ALPHA = 0.8


class Remembered:
    """What a world remembers of its requests, by unit."""

    def __init__(self, world: World, unit: int) -> None:
        self.world, self.unit = world, unit
        shape = world.shape
        self.histories = []
        for i, (_, _, remembered) in enumerate(shape.requests):
            count = world.candidates(i) // unit
            past = torch.zeros(shape.layers, shape.kv_heads, count)
            known = remembered * shape.block_size // unit
            # Around the scores, so that now the past and now the present is the larger.
            past[..., :known] = torch.rand(past[..., :known].shape, generator=world.generator)
            self.histories.append(past.to(world.device))

    def expected(self, normalised: bool = True, summed: bool = False) -> list[Tensor]:
        """What the policy makes of it."""
        history = "sum" if summed else "max"
        policy = GKV(alpha=ALPHA, variant="paper" if normalised else "zipage", history=history)
        return [policy.update(view) for view in self.world.views(self.unit, self.histories)]


class Blocks(Remembered):
    """Remembers in a table by slot and logical block; both have gaps."""

    def __init__(self, world: World) -> None:
        shape = world.shape
        super().__init__(world, shape.block_size)
        requests, tables = len(shape.requests), shape.tables
        counts = [world.candidates(i) // shape.block_size for i in range(requests)]
        self.slots = torch.randperm(requests + 2, generator=world.generator)[:requests].int()
        self.logical = torch.zeros(tables, requests, max(counts), dtype=torch.int32)
        width = 2 * max(counts) + 3
        for table in range(tables):
            for i, count in enumerate(counts):
                chosen = torch.randperm(width, generator=world.generator)[:count]
                self.logical[table, i, :count] = chosen.sort().values
        size = (requests + 2, shape.layers, shape.kv_heads, width)
        self.table = torch.full(size, INF, device=world.device)
        for i, (_, _, known) in enumerate(shape.requests):
            self.put(self.table, i, self.histories[i][..., :known])

    def put(self, table: Tensor, request: int, numbers: Tensor) -> None:
        for layer, which in enumerate(self.world.table_of_layer.tolist()):
            places = self.logical[which, request, : numbers.shape[-1]].long()
            table[self.slots[request], layer][:, places] = numbers[layer]

    def score(self, normalised: bool = True, summed: bool = False) -> list[Tensor]:
        world = self.world
        before = self.table.clone()
        scores = score_blocks(
            world.queries,
            world.layers(),
            world.due(self.unit),
            self.table,
            self.slots.to(world.device),
            self.logical.to(world.device),
            scale=world.shape.scale,
            softcap=world.shape.softcap,
            alpha=ALPHA,
            normalised=normalised,
            summed=summed,
        )
        for i, numbers in enumerate(scores):
            self.put(before, i, numbers)
        assert torch.equal(before, self.table)
        return scores


class Tokens(Remembered):
    """Remembers in a plane beside each layer's cache."""

    def __init__(self, world: World) -> None:
        super().__init__(world, 1)
        for i, (_, _, known) in enumerate(world.shape.requests):
            self.put(world.planes, i, self.histories[i][..., : known * world.shape.block_size])

    def put(self, planes: Tensor, request: int, numbers: Tensor) -> None:
        protected = self.world.shape.requests[request][1]
        for layer, which in enumerate(self.world.table_of_layer.tolist()):
            ids = self.world.tables[which, request, protected:]
            self.world.write(planes[layer], ids, numbers[layer])

    def score(self, normalised: bool = True, summed: bool = False) -> list[Tensor]:
        world = self.world
        before = world.planes.clone()
        scores = score_tokens(
            world.queries,
            world.layers(),
            world.due(),
            world.plane_pointers(),
            scale=world.shape.scale,
            softcap=world.shape.softcap,
            alpha=ALPHA,
            normalised=normalised,
            summed=summed,
        )
        for i, numbers in enumerate(scores):
            self.put(before, i, numbers)
        assert torch.equal(before, world.planes)
        return scores


@pytest.mark.parametrize("kind", [Blocks, Tokens])
@pytest.mark.parametrize("summed", [False, True], ids=["max", "sum"])
def test_history_is_the_policys_over_two_events_and_nothing_else_is_written(
    world: World, kind: type[Blocks] | type[Tokens], summed: bool
) -> None:
    remembered = kind(world)
    scores = remembered.score(summed=summed)
    # Dividing by the maximum adds its error to that of the score.
    assert_close(scores, remembered.expected(summed=summed), 2 * tolerance(world))
    # Nothing went: all candidates are remembered when the next queries come.
    remembered.histories = scores
    world.draw_queries()
    size = world.shape.block_size
    world.shape = replace(
        world.shape,
        requests=tuple(
            (live, protected, world.candidates(i) // size)
            for i, (live, protected, _) in enumerate(world.shape.requests)
        ),
    )
    again = remembered.score(summed=summed)
    assert_close(again, remembered.expected(summed=summed), 2 * tolerance(world))
    for first, second in zip(scores, again, strict=True):
        assert (second >= ALPHA * first).all()


@pytest.mark.parametrize("kind", [Blocks, Tokens])
def test_scores_that_are_not_normalised_are_zipages(
    device: torch.device, kind: type[Blocks] | type[Tokens]
) -> None:
    world = World(Shape(layers=1), device)
    remembered = kind(world)
    expected = remembered.expected(normalised=False)
    assert_close(remembered.score(normalised=False), expected, tolerance(world))


def test_a_request_scores_the_same_in_any_batch(device: torch.device) -> None:
    world = World(Shape(layers=1), device)
    together = local_scores(world.queries, world.layers(), world.due(), scale=world.shape.scale)
    for i, request in enumerate(world.shape.requests):
        alone = World(replace(world.shape, requests=(request,)), device)
        alone.caches, alone.tables = world.caches, world.tables[:, i : i + 1].contiguous()
        queries = world.queries[:, i : i + 1].contiguous()
        (scores,) = local_scores(queries, alone.layers(), alone.due(), scale=world.shape.scale)
        assert torch.equal(scores, together[i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(1, 3, 8, 6, 64)}, r"queries must be \[1, 3, query_heads, 7, 64\]"),
        ({"queries": torch.zeros(1, 3, 8, 7, 64)}, "queries must be torch.bfloat16"),
        (
            {"history": torch.zeros(5, 2, 2, 20)},
            r"history must be contiguous float32 \[slots, 1, 2",
        ),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, r"slots must be \[3\]"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "slots must be contiguous int32"),
        ({"logical_blocks": torch.zeros(1, 3, 2, dtype=torch.int32)}, "logical_blocks must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_by_name(
    device: torch.device, change: dict[str, Tensor], message: str
) -> None:
    world = World(Shape(layers=1), device)
    blocks = Blocks(world)
    arguments = {
        "queries": world.queries,
        "history": blocks.table,
        "slots": blocks.slots.to(device),
        "logical_blocks": blocks.logical.to(device),
        **{name: tensor.to(device) for name, tensor in change.items()},
    }
    with pytest.raises(ValueError, match=message):
        score_blocks(layers=world.layers(), due=world.due(16), scale=1.0, alpha=ALPHA, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"live_tokens": [63, 130]}, "live_tokens must have 3 numbers"),
        ({"live_tokens": [63, 130, 600]}, "600 live tokens do not hold"),
        ({"protected": [0, 16, 20]}, "must be multiples of 16 tokens"),
        ({"num_candidates": [64, 96, 192]}, "63 live tokens do not hold 0 protected ones, 64"),
    ],
    ids=["missing", "beyond_the_table", "half_a_block", "into_the_window"],
)
def test_lengths_that_contradict_each_other_are_refused(
    device: torch.device, change: dict[str, list[int]], message: str
) -> None:
    due = World(Shape(layers=1), device).due()
    numbers = ("live_tokens", "protected", "num_candidates", "remembered")
    with pytest.raises(ValueError, match=message):
        DueRequests.of(
            due.tables,
            due.table_of_layer,
            **{name: change.get(name, getattr(due, name)) for name in numbers},
            window=due.window,
            block_size=due.block_size,
        )
