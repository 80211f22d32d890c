# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Query rings against the whole query history of every request, through random steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gkv_vllm.engine.plan import Recording
from gkv_vllm.ops.paged import ReferenceOps
from gkv_vllm.worker.rings import QueryRings, RingIndex

CPU = torch.device("cpu")
OPS = ReferenceOps()
relaxed = settings(deadline=None)  # the clock of a busy machine says nothing about a ring


@dataclass
class Request:
    """Every query that a request has computed, and whether the ring was told."""

    queries: list[Tensor] = field(default_factory=list)
    recorded: list[bool] = field(default_factory=list)


def rings(window: int, slots: int, heads: int, head_dim: int, dtype: torch.dtype) -> QueryRings:
    return QueryRings(
        window,
        layers=2,
        slots=slots,
        query_heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        device=CPU,
    )


class World:
    """Rings of two layers, fed as a worker feeds them, next to everything that they ever saw."""

    def __init__(self, window: int, slots: int, heads: int = 5, head_dim: int = 3) -> None:
        self.window, self.shape = window, (heads, head_dim)
        self.index = RingIndex(window, 256, CPU)
        self.rings = rings(window, slots, heads, head_dim, torch.bfloat16)
        self.requests = [Request() for _ in range(slots)]
        self.generator = torch.Generator().manual_seed(0)

    def step(self, batch: list[tuple[int, int, bool]]) -> None:
        """batch: (slot, tokens, recorded) per row, in the order of the batch."""
        self.index.clear()
        recordings, start = [], 0
        queries = torch.randn(
            2, sum(n for _, n, _ in batch), *self.shape, generator=self.generator
        ).bfloat16()
        for slot, tokens, recorded in batch:
            request, end = self.requests[slot], start + tokens
            request.queries += queries[:, start:end].unbind(1)
            request.recorded += [recorded] * tokens
            if recorded:
                recording = Recording(slot=slot, num_tokens=len(request.queries))
                recordings.append((recording, start, end))
            start = end
        if recordings:
            self.index.fill(recordings)
        for layer, layer_queries in enumerate(queries):
            OPS.store_window_queries(layer_queries, self.index.places, self.rings.of_layer(layer))

    def assert_windows(self) -> None:
        """Wherever the last `window` queries were recorded, the ring holds them in order."""
        for slot, request in enumerate(self.requests):
            tokens = len(request.queries)
            if tokens < self.window or not all(request.recorded[-self.window :]):
                continue
            newest = torch.stack(request.queries[-self.window :], dim=2)  # layers, heads, window
            found = self.rings.read(self.index.window_of(slot, tokens))
            assert torch.equal(found, newest)


@st.composite
def worlds(draw: st.DrawFn, always: bool) -> tuple[World, list[list[tuple[int, int, bool]]]]:
    """A window, and steps: rows in any order, of decodes and chunks longer than the window too."""
    window, slots = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    length = st.one_of(st.just(1), st.integers(1, 3 * window))
    recorded = st.just(True) if always else st.booleans()
    row = st.tuples(st.integers(0, slots - 1), length, recorded)
    batch = st.lists(row, max_size=slots, unique_by=lambda r: r[0])
    return World(window, slots), draw(st.lists(batch, max_size=12))


@relaxed
@given(worlds(always=True))
def test_the_window_is_the_last_queries_of_the_whole_history(case) -> None:
    world, steps = case
    for batch in steps:
        world.step(batch)
        world.assert_windows()


@relaxed
@given(worlds(always=False))
def test_steps_before_the_window_need_not_be_recorded(case) -> None:
    world, steps = case
    for batch in steps:
        world.step(batch)
        world.assert_windows()


@pytest.mark.parametrize("lengths", [[1] * 40, [63], [5, 7, 1, 1, 31, 16], [16, 16, 1], [15, 1]])
def test_a_prompt_in_chunks_then_decode(lengths: list[int]) -> None:
    world = World(window=16, slots=3)
    for tokens in lengths:
        world.step([(2, tokens, True)])
    assert sum(lengths) >= world.window
    world.assert_windows()


def test_a_slot_that_changes_hands_shows_nothing_of_its_former_owner() -> None:
    world = World(window=4, slots=2)
    world.step([(0, 11, True), (1, 3, True)])
    world.requests[0] = Request()
    world.step([(0, 2, True), (1, 1, True)])
    world.step([(1, 1, True), (0, 2, True)])
    world.assert_windows()


def test_rows_that_are_not_recorded_touch_nothing() -> None:
    world = World(window=4, slots=3)
    world.step([(0, 9, True), (1, 1, True)])
    before = world.rings.queries.clone()
    world.step([(0, 6, False), (2, 1, False), (1, 1, False)])
    assert torch.equal(world.rings.queries, before)


def test_recording_one_slot_leaves_the_others_alone() -> None:
    world = World(window=4, slots=3)
    world.step([(0, 9, True), (1, 5, True), (2, 4, True)])
    before = world.rings.queries.clone()
    world.step([(0, 3, False), (1, 7, True), (2, 1, False)])
    assert torch.equal(world.rings.queries[:, :4], before[:, :4])
    assert torch.equal(world.rings.queries[:, 8:], before[:, 8:])


class OneRing:
    """One slot of a ring, and the operator that fills it."""

    def __init__(self, window: int) -> None:
        self.index = RingIndex(window, 16, CPU)
        self.rings = rings(window, 1, 2, 3, torch.float32)

    def store(self, queries: Tensor) -> None:
        OPS.store_window_queries(queries, self.index.places, self.rings.of_layer(0))

    def window(self, num_tokens: int) -> Tensor:
        return self.rings.read(self.index.window_of(0, num_tokens))[0]


def test_filling_with_no_recordings_records_nothing() -> None:
    ring = OneRing(4)
    ring.index.fill([])
    ring.store(torch.ones(5, 2, 3))
    assert not ring.rings.queries.any()


def test_a_cleared_index_records_nothing() -> None:
    ring = OneRing(4)
    ring.index.fill([(Recording(slot=0, num_tokens=5), 0, 5)])
    ring.index.clear()
    ring.store(torch.ones(5, 2, 3))
    assert not ring.rings.queries.any()


def test_a_ring_keeps_no_reference_to_the_batch() -> None:
    ring = OneRing(2)
    ring.index.fill([(Recording(slot=0, num_tokens=2), 0, 2)])
    batch = torch.ones(2, 2, 3)
    ring.store(batch)
    batch.fill_(float("nan"))  # the runner reuses its buffers
    assert torch.equal(ring.window(2), torch.ones(2, 2, 3))


def test_tokens_that_pad_the_batch_are_ignored() -> None:
    ring = OneRing(2)
    ring.index.fill([(Recording(slot=0, num_tokens=2), 0, 2)])
    batch = torch.full((8, 2, 3), float("nan"))
    batch[:2] = 1
    ring.store(batch)
    assert torch.equal(ring.window(2), torch.ones(2, 2, 3))
    assert torch.equal(ring.rings.queries[0], torch.ones(2, 2, 3))
