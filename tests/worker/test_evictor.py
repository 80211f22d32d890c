# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The order of one step on the worker, with a runner and a scorer that write down what is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gkv_vllm.engine.plan import BlockScores, Observation, Recording, StepPlan
from gkv_vllm.worker.evictor import Evictor
from gkv_vllm.worker.rings import QueryRing, RingIndex

CPU = torch.device("cpu")
SCORES = BlockScores({"b": (3, [0.5, 0.0, 1.0])}, 1e-3)


class Runner:
    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.rows = {"a": 0, "b": 1, "c": 2}

    def drop_blocks(self, request_id: str, blocks: list[int]) -> None:
        self.log.append(("drop", request_id, blocks))

    def block_ids(self, request_id: str, group: int) -> list[int]:
        return [7, 0, 8]

    def batch(self) -> dict[str, int]:
        return self.rows


class Scorer:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def reset(self, slots: list[int]) -> None:
        self.log.append(("reset", slots))

    def score(self, observed: dict[str, Observation], tables: Any) -> BlockScores:
        self.log.append(("score", list(observed), tables("b", 0)))
        return SCORES


class Step:
    """An evictor for rings of 4 places, and forwards of 1 + 6 + 2 tokens with queries 1, 2, ...."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.index = RingIndex(4, CPU)
        self.evictor = Evictor(Runner(self.log), Scorer(self.log), self.index)
        self.ring = QueryRing(self.index, 3, 1, 1, torch.float32)
        self.queries = torch.arange(1.0, 10.0).view(9, 1, 1)

    def forward(self) -> None:
        starts = torch.tensor([0, 1, 7, 9])
        self.evictor.begin_forward(SimpleNamespace(query_start_loc_cpu=starts))
        self.ring.store(self.queries)
        self.queries = self.queries + 9


@pytest.fixture
def step() -> Step:
    return Step()


FULL_PLAN = StepPlan(
    drops={"a": [1, 4], "gone": [0]},
    reset=[2],
    record={"b": Recording(slot=2, num_tokens=70), "a": Recording(slot=0, num_tokens=13)},
    observe={"b": Observation(slot=2, epoch=3, num_tokens=70)},
)


def test_a_step_drops_resets_records_and_scores_in_that_order(step: Step) -> None:
    step.evictor.begin(FULL_PLAN)
    assert step.log == [("drop", "a", [1, 4]), ("drop", "gone", [0]), ("reset", [2])]
    step.forward()
    assert step.evictor.finish() is SCORES
    assert step.log[3:] == [("score", ["b"], [7, 0, 8])]


def test_only_the_recorded_rows_reach_the_rings(step: Step) -> None:
    step.evictor.begin(FULL_PLAN)
    step.forward()
    window = step.ring.window_of(2, 70).flatten().tolist()
    assert window == [4.0, 5.0, 6.0, 7.0]  # the last four of row 1, oldest first
    assert step.ring.queries.view(3, 4)[0].tolist() == [1.0, 0.0, 0.0, 0.0]  # 12 mod 4 = 0
    assert not step.ring.queries.view(3, 4)[1].any()


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
    assert step.log == []
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


def test_nothing_observed_means_no_scores(step: Step) -> None:
    step.evictor.begin(StepPlan(drops={"a": [0]}))
    step.forward()
    assert step.evictor.finish() is None
    assert step.log == [("drop", "a", [0])]


def test_a_policy_without_queries_only_drops() -> None:
    log: list[Any] = []
    evictor = Evictor(Runner(log), None, None)
    evictor.begin(StepPlan(drops={"a": [1]}, reset=[0]))
    evictor.begin_forward(SimpleNamespace())
    assert evictor.finish() is None
    assert log == [("drop", "a", [1])]


def test_a_dummy_batch_after_a_step_leaves_the_rings_alone(step: Step) -> None:
    step.evictor.begin(FULL_PLAN)
    step.forward()
    step.evictor.finish()
    before = step.ring.queries.clone()
    step.ring.store(torch.full((1, 1, 1), 99.0))  # one token, no plan, no `begin`
    assert torch.equal(step.ring.queries, before)
