# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The planner's rules of token granularity: compaction at the start of the next step, targets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkv_vllm.engine.footprint import bounded_blocks
from gkv_vllm.engine.plan import WorkerReport
from gkv_vllm.engine.planner import choose_targets
from gkv_vllm.policies.base import Needs

from .planning import (
    BLOCK,
    BUDGET,
    DUE,
    HISTORY,
    INTERVAL,
    MASS,
    NOTHING,
    QUERIES,
    WINDOW,
    Harness,
    Life,
)

ALL_NEEDS = {"queries": QUERIES, "history": HISTORY, "mass": MASS, "nothing": NOTHING}


def tokens(needs: Needs = QUERIES, **settings: int) -> Harness:
    return Harness(needs=needs, granularity="token", **settings)  # type: ignore[arg-type]


# ---- when


@pytest.mark.parametrize("needs", ALL_NEEDS.values(), ids=ALL_NEEDS)
@pytest.mark.parametrize("prompt", [0, 1, 8, 13])
def test_request_is_compacted_at_the_start_of_the_step_after_it_fell_due(
    needs: Needs, prompt: int
) -> None:
    harness = tokens(needs)
    harness.add("a", prompt)
    life, due_at = harness.lives["a"], -(-prompt // BLOCK) * BLOCK + DUE
    compacted = []
    while life.num_tokens < 80 + prompt:
        if harness.step("a").compact:
            compacted.append(life.num_tokens)
    # Then 6 blocks become 4, and the next 8 tokens make it due again.
    assert life.observed == list(range(due_at, 81 + prompt, 2 * BLOCK))
    assert compacted == [n + 1 for n in life.observed if n < 80 + prompt]


def test_compaction_waits_for_nothing_the_worker_sends() -> None:
    harness = tokens(lag=3)
    harness.add("a")
    harness.run("a", until=DUE + 1)
    assert harness.lives["a"].dropped
    assert not any(harness.on_the_way)


def test_request_is_compacted_even_if_the_next_step_leaves_it_out() -> None:
    harness = tokens()
    harness.add("a")
    harness.add("b")
    harness.run("a", until=DUE)
    plan = harness.step("b")
    assert set(plan.compact) == set(plan.drops) == {"a"}
    assert "a" not in plan.record


def test_all_requests_due_at_once_are_compacted_in_one_step_in_the_order_they_fell_due() -> None:
    names = ["d", "b", "a", "c"]
    harness = tokens()
    for name in names:
        harness.add(name)
    harness.run(*names, until=DUE)
    assert list(harness.planner.compactions()) == names


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    chunks=st.lists(st.integers(1, 40), min_size=10, max_size=60),
    prompt=st.integers(1, 90),
    protect=st.sampled_from(["prompt", "sinks", "none"]),
    window=st.integers(1, 12),
    interval=st.integers(1, 20),
    budget=st.integers(16, 40),
    needs=st.sampled_from(list(ALL_NEEDS.values())),
)
def test_compaction_keeps_the_budget_and_the_bound(
    chunks: list[int],
    prompt: int,
    protect: str,
    window: int,
    interval: int,
    budget: int,
    needs: Needs,
) -> None:
    harness = tokens(needs, window=window, interval=interval)
    harness.add("a", prompt, protect=protect, budget=budget)
    life, track = harness.lives["a"], harness.planner.tracks["a"]
    for chunk in chunks:
        before = len(life.drops)
        harness.step("a", tokens=chunk)
        live = life.live()
        assert len(live) <= bounded_blocks(track.protected, track.due, max(chunks), BLOCK)
        if len(life.drops) > before:
            n = life.num_tokens - chunk
            counted = [b for b in live if track.protected <= b < -(-n // BLOCK)]
            assert len(counted) == -(-budget // BLOCK)
            # Survivors, tail and window are all that is left.
            assert set(life.compactions[-1].targets) <= live
            assert set(range((n - window) // BLOCK, -(-n // BLOCK))) <= live


# ---- what a selection says


def test_selection_names_all_it_takes_to_score_a_request() -> None:
    harness = tokens()
    harness.add("a", prompt=7, key=5)
    life = harness.lives["a"]
    harness.run("a", until=8 + DUE)
    first = life.selections[-1]
    # Blocks 2..6 end at or before 32 - 4; block 7 is the window. 6 unprotected blocks become 4.
    assert (first.slot, first.num_tokens, first.protected, first.key) == (0, 32, 2, 5)
    assert (first.candidates, first.keep) == (([2, 3, 4, 5, 6],), 3)
    assert (first.remembered, first.event) == (0, 0)
    harness.run("a", until=8 + DUE + 2 * BLOCK)
    second = life.selections[-1]
    assert life.compactions[0].targets == [2, 3, 4]
    assert (second.candidates, second.keep) == (([2, 3, 4, 7, 8],), 3)
    assert (second.remembered, second.event) == (3, 1)


def test_survivors_are_remembered_wherever_they_went() -> None:
    harness = tokens()
    harness.add("a")
    harness.shared = {("a", 0), ("a", 1), ("a", 2)}
    harness.run("a", until=DUE + 2 * BLOCK)
    life = harness.lives["a"]
    assert life.compactions[0].targets == [0, 3, 4]
    assert life.compactions[0].fresh == {0: {0: 900}}
    assert life.selections[-1].candidates[0][: life.selections[-1].remembered] == [0, 3, 4]


@pytest.mark.parametrize("window", range(1, 14))
def test_survivors_fill_the_budget_but_for_window_and_tail(window: int) -> None:
    # 16 tokens of budget hold at most 12 of window and one block; `none` protects nothing.
    harness = tokens(window=min(window, 12), interval=1)
    harness.add("a", prompt=5, protect="none")
    harness.run("a", until=100)
    for seen in harness.lives["a"].selections:
        kept_for_sure = seen.num_tokens - (seen.candidates[0][-1] + 1) * BLOCK
        assert harness.planner.config.window <= kept_for_sure < min(window, 12) + BLOCK
        assert seen.keep * BLOCK + kept_for_sure <= BUDGET
        assert seen.keep * BLOCK + kept_for_sure > BUDGET - BLOCK


def test_budget_that_window_and_tail_fill_leaves_no_survivors() -> None:
    harness = tokens(interval=7)  # due at 15 tokens: two full blocks, and 7 tokens that stay
    harness.add("a", budget=2 * BLOCK)
    harness.run("a", until=16)
    life = harness.lives["a"]
    assert [order.targets for order in life.compactions] == [[]]
    assert life.dropped == [[0, 1]]


@pytest.mark.parametrize("needs", [HISTORY, MASS, NOTHING])
def test_history_beside_the_cache_takes_no_slot(needs: Needs) -> None:
    harness = tokens(needs, slots=0)
    harness.add("a")
    harness.run("a", until=5 * DUE)
    life = harness.lives["a"]
    assert len(life.compactions) > 5
    assert {seen.slot for seen in life.selections} == {None}
    assert not harness.planner.stats.skipped


def test_request_without_a_ring_is_skipped_and_served_later() -> None:
    harness = tokens(slots=1)
    harness.add("a")
    harness.add("b")
    harness.run("a", "b", until=DUE + 3)
    assert harness.lives["b"].selections == []
    harness.planner.remove("a")
    for _ in range(2 * WINDOW):
        harness.step("b")  # the harness refuses a ring that is not full
    assert harness.lives["b"].observed == [DUE + 3 + WINDOW]
    assert harness.lives["b"].dropped


# ---- targets


def test_targets_are_the_first_private_ones() -> None:
    assert choose_targets([True, True, True, True], 2) == ([0, 1], [])
    assert choose_targets([False, True, False, True, True], 2) == ([1, 3], [])


def test_too_few_private_ones_are_joined_by_the_first_shared_ones_renewed() -> None:
    assert choose_targets([False, False, True, False], 3) == ([0, 1, 2], [0, 1])
    assert choose_targets([False, False], 1) == ([0], [0])
    assert choose_targets([False, True], 0) == ([], [])


@given(private=st.lists(st.booleans(), max_size=12), data=st.data())
def test_targets_are_enough_and_fresh_only_where_private_ones_run_out(
    private: list[bool], data: st.DataObject
) -> None:
    keep = data.draw(st.integers(0, len(private)))
    places, fresh = choose_targets(private, keep)
    own = [place for place, is_private in enumerate(private) if is_private]
    shared = [place for place, is_private in enumerate(private) if not is_private]
    assert len(places) == keep
    assert places == sorted(set(places))
    assert len(fresh) == max(0, keep - len(own))
    assert fresh == shared[: len(fresh)]
    assert sorted(set(places) - set(fresh)) == own[: keep - len(fresh)]


# ---- postponed


def postponed(harness: Harness) -> Life:
    """Bring a request that shares all it has to where it was postponed for want of a block."""
    harness.add("a")
    harness.shared = {("a", block) for block in range(100)}
    harness.free_blocks = 0
    harness.run("a", until=DUE + 1)
    life = harness.lives["a"]
    assert life.drops == []
    assert harness.planner.stats.skipped == {"no_free_block": 1}
    return life


def test_postponed_request_falls_due_again_in_its_next_step_with_a_new_window() -> None:
    harness = tokens()
    life = postponed(harness)
    assert life.observed == [DUE, DUE + 1]  # the harness checks both rings
    harness.free_blocks = 2
    plan = harness.step("a")
    assert plan.compact["a"].selection.num_tokens == DUE + 1
    assert plan.compact["a"].selection.keep == 2, "one block more than the budget has started"
    assert plan.compact["a"].fresh == {0: {0: 900, 1: 901}}


def test_postponed_request_keeps_all_and_goes_down_to_its_budget_at_once_later() -> None:
    harness = tokens()
    life = postponed(harness)
    harness.run("a", until=60)
    assert life.live() == set(range(15))
    assert harness.planner.stats.skipped == {"no_free_block": 60 - DUE}
    harness.shared.clear()
    harness.step("a")
    assert len(life.live()) == BUDGET // BLOCK + 1
    assert life.selections[-1].event == life.selections[-1].remembered == 0


def test_postponed_request_that_takes_no_further_step_is_left_alone() -> None:
    harness = tokens()
    harness.add("b")
    life = postponed(harness)
    harness.planner.compactions()  # what was due in the step that postponed it
    harness.planner.postpone("a", "no_free_block")
    harness.shared.clear()
    for _ in range(5):
        assert not harness.step("b").compact
    assert life.drops == []


# ---- epochs: preemption, resume, end


@pytest.mark.parametrize("end", ["restart", "remove", "opt_out"])
def test_due_request_that_lost_its_blocks_is_not_compacted(end: str) -> None:
    harness = tokens()
    harness.add("a")
    harness.run("a", until=DUE)
    if end == "opt_out":
        harness.add("a", evict=False)
    else:
        getattr(harness.planner, end)("a")
    assert harness.planner.compactions() == {}
    assert not harness.planner.plan([])
    assert harness.planner.stats.evictions == 0


@pytest.mark.parametrize("end", ["restart", "remove"])
def test_compaction_of_a_request_that_lost_its_table_never_reaches_the_worker(end: str) -> None:
    harness = tokens()
    for name in ("a", "b"):
        harness.add(name)
    harness.run("a", "b", until=DUE)
    for name in harness.planner.compactions():
        harness.planner.compacted(name, [0, 1, 2], {})
    getattr(harness.planner, end)("a")  # as vLLM preempts while it schedules
    plan = harness.planner.plan([])
    assert set(plan.compact) == set(plan.drops) == {"b"}


def test_request_starts_over_after_a_preemption() -> None:
    harness = tokens()
    harness.add("a", prompt=6)
    harness.run("a", until=80)
    before = harness.planner.tracks["a"].epoch
    harness.planner.restart("a")
    harness.lives["a"] = Life()
    assert harness.planner.tracks["a"].epoch > before
    harness.run("a", until=80, tokens=40)  # the prefill of prompt and outputs is compacted as well
    first, second = harness.lives["a"].selections
    assert (first.remembered, first.event, second.event) == (0, 0, 1)


def test_report_of_compactions_is_counted_and_evicts_nothing() -> None:
    harness = tokens()
    harness.add("a")
    harness.run("a", until=DUE)
    harness.planner.accept(WorkerReport({}, events=2, seconds=0.5))
    assert harness.planner.stats.eviction_us == {250_000: 2}
    assert harness.planner.stats.evictions == 0
    assert not harness.planner.stats.skipped


def test_compaction_is_counted_with_its_blocks_tokens_and_live_tokens() -> None:
    harness = tokens()
    harness.add("a", prompt=7)
    harness.run("a", until=8 + DUE + 1)
    stats = harness.planner.stats
    assert (stats.evictions, stats.blocks_freed, stats.tokens_evicted) == (1, 2, 8)
    assert stats.live_tokens == {8 + BUDGET: 1}


# ---- independence


@pytest.mark.parametrize("needs", ALL_NEEDS.values(), ids=ALL_NEEDS)
def test_selections_do_not_depend_on_neighbours(needs: Needs) -> None:
    alone, crowd = tokens(needs, slots=8), tokens(needs, slots=8)
    alone.add("a", prompt=7)
    alone.run("a", until=120)
    rng = random.Random(0)
    for other in range(6):
        crowd.add(f"r{other}", prompt=7 + other % 2)
    crowd.add("a", prompt=7)
    while crowd.lives["a"].num_tokens < 120:
        crowd.step("a", *(f"r{i}" for i in range(6) if rng.random() < 0.7))
    assert len(alone.lives["a"].drops) > 10
    assert crowd.lives["a"].drops == alone.lives["a"].drops
    chosen = [
        [(seen.num_tokens, seen.candidates, seen.keep, seen.remembered) for seen in of.selections]
        for of in (alone.lives["a"], crowd.lives["a"])
    ]
    assert chosen[0] == chosen[1]


def test_recorded_steps_are_those_of_the_window() -> None:
    harness = tokens()
    harness.add("a")
    harness.run("a", until=80)
    assert set(harness.lives["a"].recorded) == {
        n for n in range(81) for due in range(DUE, 90, INTERVAL) if due - WINDOW < n <= due
    }
