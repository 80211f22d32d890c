# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The order of one step on the worker, with a runner and a scorer that write down what is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gkv_vllm.engine.plan import (
    Compaction,
    Observation,
    Recording,
    Selection,
    StepPlan,
    WorkerReport,
)
from gkv_vllm.ops.paged import ReferenceOps
from gkv_vllm.worker.evictor import Evictor
from gkv_vllm.worker.mass import MassIndex
from gkv_vllm.worker.rings import QueryRings, RingIndex
from gkv_vllm.worker.stopwatch import Stopwatch

from .test_stopwatch import Stream

CPU = torch.device("cpu")
SCORES = [[0.5, 0.0, 1.0]]
LAYER_GROUP_OF = {0: 0, 2: 1}
"""KV cache group 1 is windowed: not ours."""


class Runner:
    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.rows = {"a": 0, "b": 1, "c": 2}

    def set_blocks(self, request_id: str, group: int, blocks: list[int], ids: list[int]) -> None:
        self.log.append(("set", request_id, group, blocks, ids))

    def row(self, request_id: str, group: int) -> list[int]:
        return [7, 0, 8]

    def batch(self, metadata: Any) -> dict[str, int]:
        return self.rows

    def lost(self, request_id: str, blocks: int) -> None:
        pass

    def forget(self, request_ids: Any) -> None:
        pass


class Scorer:
    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.kept: dict[int, Any] = {}

    def reset(self, slots: list[int]) -> None:
        self.log.append(("reset", slots))

    def block_scores(self, observed: Any) -> Any:
        self.log += [("score", seen.slot, table(0)) for seen, table in observed]
        return [torch.tensor(SCORES) for _ in observed]

    def compact(self, orders: Any) -> None:
        self.log += [("compact", order.targets, table(0)) for order, table in orders]
        self.kept |= {order.record: "kept" for order, _ in orders if order.record is not None}


class Ring:
    """The ring of one layer, stored to as a layer does."""

    def __init__(self, index: RingIndex) -> None:
        self.index = index
        self.rings = QueryRings(
            4, layers=1, slots=3, query_heads=1, head_dim=1, dtype=torch.float32, device=CPU
        )

    @property
    def queries(self) -> torch.Tensor:
        return self.rings.of_layer(0)

    def store(self, queries: torch.Tensor) -> None:
        ReferenceOps().store_window_queries(queries, self.index.places, self.queries)

    def read(self, places: torch.Tensor) -> torch.Tensor:
        return self.rings.read(places)[0]


class Step:
    """An evictor for rings of 4 places, and forwards of 1 + 6 + 2 tokens with queries 1, 2, ...."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.index, self.mass = RingIndex(4, 16, CPU), MassIndex()
        self.evictor = Evictor(
            Runner(self.log),
            Scorer(self.log),
            LAYER_GROUP_OF,
            ring_index=self.index,
            mass_index=self.mass,
        )
        self.ring = Ring(self.index)
        self.queries = torch.arange(1.0, 10.0).view(9, 1, 1)

    def forward(self) -> None:
        starts = torch.tensor([0, 1, 7, 9])
        for group in LAYER_GROUP_OF:
            metadata = SimpleNamespace(
                query_start_loc_cpu=starts,
                query_start_loc=starts,
                seq_lens=torch.tensor([40, 50, 60]),
                block_table_tensor=torch.full((3, 2), group),
            )
            self.evictor.begin_forward(group, metadata, metadata)
        self.ring.store(self.queries)
        self.queries = self.queries + 9


@pytest.fixture
def step() -> Step:
    return Step()


def selection(slot: int = 2) -> Selection:
    return Selection(slot, 70, 0, ([0, 1, 2],), 2, 0, 0, 0)


FULL_PLAN = StepPlan(
    compact={"c": Compaction(selection(), [0, 1], {0: {1: 99}})},
    drops={"c": ([2], [2]), "a": ([1, 4], [0, 3]), "gone": ([0], [0])},
    reset=[2],
    record={"b": Recording(slot=2, num_tokens=70), "a": Recording(slot=0, num_tokens=13)},
    accumulate={"c": 32},
    observe={"b": Observation(3, selection())},
)


def test_survivors_move_before_tables_change_and_scores_come_last(step: Step) -> None:
    step.evictor.begin(FULL_PLAN)
    assert step.log == [
        ("compact", [0, 1], [7, 0, 8]),
        ("set", "c", 0, [1], [99]),
        ("set", "c", 0, [2], [0]),
        ("set", "c", 2, [2], [0]),
        ("set", "a", 0, [1, 4], [0, 0]),
        ("set", "a", 2, [0, 3], [0, 0]),
        ("set", "gone", 0, [0], [0]),
        ("set", "gone", 2, [0], [0]),
        ("reset", [2]),
    ]
    del step.log[:]
    step.forward()
    report = step.evictor.finish()
    assert report is not None
    ((epoch, scores),) = [report.scores["b"]]
    assert list(report.scores) == ["b"]
    assert (epoch, scores.tolist()) == (3, SCORES)
    assert report.events == 2
    assert report.seconds > 0
    assert step.log == [("score", 2, [7, 0, 8])]


def test_only_the_recorded_rows_reach_the_rings(step: Step) -> None:
    step.evictor.begin(FULL_PLAN)
    step.forward()
    window = step.ring.read(step.index.window_of(2, 70)).flatten().tolist()
    assert window == [4.0, 5.0, 6.0, 7.0]  # the last four of row 1, oldest first
    assert step.ring.queries.view(3, 4)[0].tolist() == [1.0, 0.0, 0.0, 0.0]  # 12 mod 4 = 0
    assert not step.ring.queries.view(3, 4)[1].any()


def test_attention_is_accumulated_for_the_rows_that_ask_in_every_group(step: Step) -> None:
    step.evictor.begin(FULL_PLAN)
    step.forward()
    assert sorted(step.mass.batches) == [0, 2]
    for group, batch in step.mass.batches.items():
        assert batch.protected.tolist() == [-1, -1, 32]
        assert batch.live_table.unique().tolist() == [group]
    step.evictor.finish()
    assert not step.mass.batches


def test_rows_are_looked_up_when_the_batch_is_known(step: Step) -> None:
    """Between `begin` and the forward the runner adds, removes and reorders rows."""
    step.evictor.begin(StepPlan(record={"b": Recording(slot=1, num_tokens=2)}))
    step.evictor.runner.rows = {"b": 2, "c": 1}
    step.forward()
    assert step.ring.queries.view(3, 4)[1].tolist() == [8.0, 9.0, 0.0, 0.0]


@pytest.mark.parametrize("plan", [None, StepPlan()], ids=["no_plan", "empty_plan"])
def test_without_a_plan_nothing_happens(step: Step, plan: StepPlan | None) -> None:
    step.evictor.begin(plan)
    step.forward()
    assert step.evictor.finish() is None
    assert [entry for entry in step.log if entry != ("reset", [])] == []
    assert not step.ring.queries.any()


def test_a_forward_outside_a_step_records_nothing(step: Step) -> None:
    """vLLM also builds metadata for dummy runs, at start-up and between steps."""
    step.forward()
    step.evictor.begin(FULL_PLAN)
    step.forward()
    step.evictor.finish()
    step.evictor.begin(None)
    before = step.ring.queries.clone()
    step.forward()
    assert torch.equal(step.ring.queries, before)


def test_a_plan_is_carried_out_once(step: Step) -> None:
    step.evictor.begin(FULL_PLAN)
    step.forward()
    step.evictor.finish()
    assert step.evictor.finish() is None


def test_a_compaction_is_reported_though_it_has_no_scores(step: Step) -> None:
    step.evictor.begin(StepPlan(compact=FULL_PLAN.compact))
    step.forward()
    report = step.evictor.finish()
    assert report is not None
    assert (report.scores, report.events) == ({}, 1)


def test_what_a_recorded_compaction_kept_is_reported_once(step: Step) -> None:
    recorded = Compaction(selection(), [0, 1], record=5)
    step.evictor.begin(StepPlan(compact={"a": recorded, "c": FULL_PLAN.compact["c"]}))
    step.forward()
    report = step.evictor.finish()
    assert report is not None
    assert report.kept == {5: "kept"}
    step.evictor.begin(StepPlan(compact=FULL_PLAN.compact))
    step.forward()
    again = step.evictor.finish()
    assert again is not None
    assert again.kept == {}


def test_time_that_is_known_later_is_reported_later(step: Step) -> None:
    """As on a GPU: scores leave with their step, and nobody waits for the time they took."""
    stream = Stream()
    step.evictor.stopwatch = Stopwatch(stream.new_event)
    step.evictor.begin(FULL_PLAN)
    step.forward()
    report = step.evictor.finish()
    assert report is not None
    assert list(report.scores) == ["b"]
    assert (report.events, report.seconds) == (0, 0.0)
    assert step.evictor.finish() is None
    stream.run(4)
    report = step.evictor.finish()
    assert report is not None
    assert (report.scores, report.events) == ({}, 2)


def test_drops_alone_report_nothing(step: Step) -> None:
    step.evictor.begin(StepPlan(drops={"a": ([0], [0])}))
    step.forward()
    assert step.evictor.finish() is None


def test_a_policy_without_queries_needs_no_rings() -> None:
    log: list[Any] = []
    evictor = Evictor(Runner(log), Scorer(log), {0: 0})
    evictor.begin(StepPlan(drops={"a": ([1],)}, record={}, accumulate={}))
    evictor.begin_forward(0, SimpleNamespace(), SimpleNamespace())
    assert evictor.finish() is None
    assert ("set", "a", 0, [1], [0]) in log


def test_a_dummy_batch_after_a_step_leaves_the_rings_alone(step: Step) -> None:
    step.evictor.begin(FULL_PLAN)
    step.forward()
    step.evictor.finish()
    before = step.ring.queries.clone()
    step.ring.store(torch.full((1, 1, 1), 99.0))  # one token, no plan, no `begin`
    assert torch.equal(step.ring.queries, before)


def test_a_report_that_found_no_way_up_goes_with_the_next_one() -> None:
    """A step with nothing to sample has no output of its own."""
    first = WorkerReport({"a": (1, [[0.5]])}, events=2, seconds=0.25, kept={3: "first"})
    second = WorkerReport({"b": (2, [[0.75]])}, events=1, seconds=0.5, kept={4: "kept"})
    assert second.after(None) == second
    both = WorkerReport({**first.scores, **second.scores}, 3, 0.75, {3: "first", 4: "kept"})
    assert second.after(first) == both
