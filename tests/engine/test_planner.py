# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The planner's rules (docs/design.md) on numbers alone; those of token granularity have a file."""

from __future__ import annotations

import logging
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkv_vllm.engine.footprint import bounded_blocks
from gkv_vllm.engine.planner import OVERDUE_FACTOR
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
    descending,
    in_group,
)

ALL_NEEDS = {"queries": QUERIES, "history": HISTORY, "mass": MASS, "nothing": NOTHING}


@pytest.fixture(params=ALL_NEEDS)
def needs(request: pytest.FixtureRequest) -> Needs:
    return ALL_NEEDS[request.param]


# ---- purity


def test_planner_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, gkv_vllm.engine.planner;"
        "print(*(m for m in ('torch', 'vllm', 'numpy', 'prometheus_client') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ---- who is recorded, who is observed


@pytest.mark.parametrize("prompt", [0, 1, 8, 13])
def test_decode_is_recorded_in_exactly_the_steps_of_its_window(prompt: int) -> None:
    harness = Harness()
    harness.add("a", prompt)
    harness.run("a", until=60 + prompt)
    life = harness.lives["a"]
    due_at = -(-prompt // BLOCK) * BLOCK + DUE
    # Then 6 blocks become 4, and the next 8 tokens make it due again.
    assert life.observed == list(range(due_at, 61 + prompt, 2 * BLOCK))
    assert set(life.recorded) == {
        n for n in range(61 + prompt) for due in range(due_at, 80, 8) if due - WINDOW < n <= due
    }


@pytest.mark.parametrize(
    ("chunk", "recorded", "observed"),
    [
        (1, [21, 22, 23, 24], [24]),
        (2, [22, 24], [24]),
        (3, [21, 24], [24]),
        (5, [25], [25]),
        (7, [21, 28], [28]),
        (63, [63], [63]),
    ],
)
def test_prefill_chunks_are_recorded_when_the_window_holds_their_queries(
    chunk: int, recorded: list[int], observed: list[int]
) -> None:
    harness = Harness()
    harness.add("a", prompt=200, protect="none")
    while not harness.lives["a"].observed:
        harness.step("a", tokens=chunk)
    assert (harness.lives["a"].recorded, harness.lives["a"].observed) == (recorded, observed)


def test_protected_prompt_is_never_observed_during_its_prefill() -> None:
    harness = Harness()
    harness.add("a", prompt=201)
    harness.run("a", until=201, tokens=7)
    assert harness.lives["a"].recorded == []


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    chunks=st.lists(st.integers(1, 40), min_size=5, max_size=60),
    window=st.integers(1, 12),
    interval=st.integers(1, 20),
    protect=st.sampled_from(["prompt", "sinks", "none"]),
    prompt=st.integers(1, 90),
    lag=st.integers(0, 1),
)
def test_observed_ring_holds_exactly_the_window(
    chunks: list[int], window: int, interval: int, protect: str, prompt: int, lag: int
) -> None:
    harness = Harness(window=window, interval=interval, lag=lag)
    harness.add("a", prompt, protect=protect)
    for chunk in chunks:
        harness.step("a", tokens=chunk)  # the harness checks every observed ring


def test_request_is_observed_once_per_eviction() -> None:
    harness = Harness(lag=1)
    harness.add("a")
    plans = [harness.step("a") for _ in range(DUE + 2)]
    assert [bool(plan.observe) for plan in plans] == [False] * (DUE - 1) + [True, False, False]
    assert plans[-1].drops  # the scores came one step later, the eviction after that


def test_all_requests_due_at_once_are_observed_in_one_step() -> None:
    names = [f"r{i}" for i in range(8)]
    harness = Harness(slots=8)
    for name in names:
        harness.add(name)
    plans = [harness.step(*names) for _ in range(DUE)]
    assert set(plans[-1].observe) == set(names)
    assert not any(plan.observe for plan in plans[:-1])
    assert set(harness.step(*names).drops) == set(names)


# ---- which blocks go


def test_lowest_scores_go() -> None:
    values = [9.0, 1.0, 8.0, 2.0, 7.0, 0.0]
    harness = Harness(score=lambda _, __, block: values[block])
    harness.add("a")
    harness.run("a", until=DUE + 1)
    # Block 5 has the lowest score but lies in the window.
    assert harness.lives["a"].dropped == [[1, 3]]


def test_ties_go_to_the_older_block() -> None:
    harness = Harness(score=lambda *_: 0.5)
    harness.add("a")
    harness.run("a", until=DUE + 1)
    assert harness.lives["a"].dropped == [[0, 1]]


@pytest.mark.parametrize(("protect", "protected"), [("prompt", 3), ("sinks", 1), ("none", 0)])
def test_protected_blocks_never_go(protect: str, protected: int) -> None:
    harness = Harness(score=lambda _, __, block: float(block))
    harness.add("a", prompt=11, protect=protect)
    harness.run("a", until=90)
    assert harness.lives["a"].dropped[0] == [protected, protected + 1]
    assert min(harness.lives["a"].holes()) == protected


@pytest.mark.parametrize("window", [1, 3, 4, 5, 8, 11])
def test_window_and_partial_tail_never_go(window: int) -> None:
    harness = Harness(window=window, score=descending)
    harness.add("a", prompt=7)
    harness.run("a", until=150, tokens=3)
    life = harness.lives["a"]
    assert len(life.dropped) > 3
    for num_tokens, blocks in zip(life.observed, life.dropped, strict=False):
        assert (max(blocks) + 1) * BLOCK <= num_tokens - window


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    chunks=st.lists(st.integers(1, 40), min_size=10, max_size=60),
    prompt=st.integers(1, 90),
    protect=st.sampled_from(["prompt", "sinks", "none"]),
    interval=st.integers(1, 20),
    budget=st.integers(8, 40),
    lag=st.integers(0, 1),
    needs=st.sampled_from(list(ALL_NEEDS.values())),
    layer_groups=st.integers(1, 3),
)
def test_budget_is_kept_exactly_and_the_bound_is_never_passed(
    chunks: list[int],
    prompt: int,
    protect: str,
    interval: int,
    budget: int,
    lag: int,
    needs: Needs,
    layer_groups: int,
) -> None:
    harness = Harness(interval=interval, lag=lag, needs=needs, layer_groups=layer_groups)
    harness.add("a", prompt, protect=protect, budget=budget)
    life, track = harness.lives["a"], harness.planner.tracks["a"]
    for chunk in chunks:
        before = len(life.dropped)
        harness.step("a", tokens=chunk)
        in_flight = max(chunks) * (1 + 2 * lag)
        for group in range(layer_groups):
            live = life.live(group)
            assert len(live) <= bounded_blocks(track.protected, track.due, in_flight, BLOCK)
            if len(life.drops) > before:
                seen = life.observed[len(life.drops) - 1]
                counted = [b for b in live if track.protected <= b < -(-seen // BLOCK)]
                assert len(counted) == -(-budget // BLOCK)
    for group in range(layer_groups):
        gone = [block for groups in life.drops for block in groups[group]]
        assert len(gone) == len(set(gone)), "a block went twice"


def test_evicted_blocks_are_not_candidates_again() -> None:
    harness = Harness(score=lambda *_: 0.0)
    harness.add("a")
    harness.run("a", until=200)
    gone = [block for blocks in harness.lives["a"].dropped for block in blocks]
    assert len(gone) == len(set(gone)) > 20


# ---- independence


@pytest.mark.parametrize("lag", [0, 1])
def test_kept_set_does_not_depend_on_neighbours(needs: Needs, lag: int) -> None:
    alone = Harness(needs=needs, lag=lag)
    alone.add("a", prompt=7, key=11)
    alone.run("a", until=120)
    crowd = Harness(needs=needs, lag=lag)
    for other in range(7):
        crowd.add(f"r{other}", prompt=7 + other % 2, key=other)
    for _ in range(5):
        crowd.step(*(f"r{i}" for i in range(7)))
    crowd.add("a", prompt=7, key=11)
    names = ["r3", "a", *(f"r{i}" for i in range(7) if i != 3)]
    crowd.run(*names[:5], until=120)
    assert len(alone.lives["a"].dropped) > 10
    # The faster neighbours stopped nobody: "a" made every one of its steps.
    length = len(alone.lives["a"].dropped)
    assert crowd.lives["a"].dropped[:length] == alone.lives["a"].dropped


def test_kept_set_is_the_same_with_scores_one_step_late() -> None:
    dropped = []
    for lag in (0, 1):
        harness = Harness(lag=lag)
        harness.add("a", prompt=9)
        harness.run("a", until=150)
        dropped.append(harness.lives["a"].dropped)
    shortest = min(map(len, dropped))
    assert shortest > 10
    assert dropped[0][:shortest] == dropped[1][:shortest]


def test_selection_carries_the_key_of_its_request() -> None:
    harness = Harness(needs=Needs(seeded=True))
    harness.add("a", key=1)
    harness.add("b", key=2)
    harness.run("a", "b", until=60)
    harness.planner.restart("a")
    harness.lives["a"] = Life()
    harness.run("a", until=60)
    for request_id, key in (("a", 1), ("b", 2)):
        keys = [seen.key for seen in harness.lives[request_id].selections]
        assert keys == [key] * len(keys) != []


# ---- layer groups


def test_groups_of_layers_lose_equally_many_blocks_at_once_and_keep_their_own() -> None:
    harness = Harness(layer_groups=3)
    harness.add("a", prompt=7)
    harness.run("a", until=120)
    life = harness.lives["a"]
    assert len(life.drops) > 10
    assert all(len(set(map(len, groups))) == 1 for groups in life.drops)
    assert len({tuple(sorted(life.holes(group))) for group in range(3)}) == 3
    # The harness checks that each group's candidates are what that group still holds.
    survivors = harness.planner.tracks["a"].survivors
    assert [set(group) <= life.live(i) for i, group in enumerate(survivors)] == [True] * 3


def test_scores_of_a_group_decide_about_this_group_only() -> None:
    def score(request_id: str, num_tokens: int, block: int) -> float:
        return block if request_id == in_group("a", 1) else -block

    harness = Harness(layer_groups=2, score=score)
    harness.add("a")
    harness.run("a", until=DUE + 1)
    assert harness.lives["a"].drops == [([3, 4], [0, 1])]


def test_every_group_counts_its_freed_blocks_but_tokens_count_once() -> None:
    harness = Harness(layer_groups=3)
    harness.add("a")
    harness.run("a", until=DUE + 1)
    stats = harness.planner.stats
    assert (stats.evictions, stats.blocks_freed, stats.tokens_evicted) == (1, 6, 8)


# ---- what a policy needs


def test_every_step_accumulates_for_policies_that_need_attention_mass() -> None:
    harness = Harness(needs=MASS)
    harness.add("a", prompt=9)
    harness.add("b", prompt=9, protect="none")
    harness.add("other", evict=False)
    for _ in range(3 * DUE):
        assert harness.step("a", "b", "other").accumulate == {"a": 12, "b": 0}
        assert harness.step("b").accumulate == {"b": 0}
    assert harness.lives["a"].dropped
    assert not harness.lives["a"].recorded


@pytest.mark.parametrize(("protect", "protected"), [("prompt", 12), ("sinks", 4), ("none", 0)])
def test_cached_prefix_is_used_as_deep_as_its_queries_may_be_missing(
    protect: str, protected: int
) -> None:
    for needs in ALL_NEEDS.values():
        harness = Harness(needs=needs)
        harness.add("a", prompt=9, protect=protect)
        beyond = 0 if needs.attention_mass else DUE - WINDOW
        assert harness.planner.usable_prefix("a") == protected + beyond
    assert harness.planner.usable_prefix("nobody") is None


def test_request_that_opted_out_may_use_every_cached_token(needs: Needs) -> None:
    harness = Harness(needs=needs)
    harness.add("a", prompt=9, evict=False)
    assert harness.planner.usable_prefix("a") is None


def test_only_queries_are_recorded(needs: Needs) -> None:
    harness = Harness(needs=needs)
    harness.add("a")
    harness.run("a", until=3 * DUE)
    assert bool(harness.lives["a"].recorded) == needs.queries
    assert len(harness.lives["a"].dropped) > 3


def test_block_history_needs_a_slot_even_without_queries() -> None:
    harness = Harness(needs=HISTORY, slots=1)
    harness.add("a")
    harness.add("b")
    harness.run("a", "b", until=DUE)
    assert [seen.slot for seen in harness.lives["a"].selections] == [0]
    assert harness.lives["b"].selections == []
    assert harness.planner.stats.skipped["no_slot"] == WINDOW


@pytest.mark.parametrize("needs", [NOTHING, MASS, Needs(seeded=True)])
def test_policies_that_remember_nothing_between_steps_need_no_slot(needs: Needs) -> None:
    harness = Harness(needs=needs, slots=0)
    harness.add("a")
    harness.run("a", until=DUE + 1)
    assert harness.lives["a"].dropped
    assert not harness.planner.stats.skipped


# ---- epochs: preemption, resume, end


def observed_but_not_scored(harness: Harness, request_id: str = "a") -> None:
    """Bring a request to the point where its scores are on their way."""
    harness.add(request_id)
    while not harness.lives[request_id].observed:
        harness.step(request_id)


@pytest.mark.parametrize("event", ["remove", "restart", "reuse", "opt_out"])
def test_scores_of_an_old_epoch_are_dropped_and_counted(event: str) -> None:
    harness = Harness(lag=1)
    observed_but_not_scored(harness)
    if event == "remove":
        harness.planner.remove("a")
    elif event == "restart":
        harness.planner.restart("a")
    elif event == "reuse":
        harness.planner.remove("a")
        harness.add("a")
    else:
        harness.add("a", evict=False)
    harness.deliver()
    assert harness.planner.evictions() == {}
    assert harness.planner.stats.skipped["stale"] == 1
    assert harness.planner.stats.evictions == 0


def test_stale_scores_do_not_answer_the_observation_of_a_new_epoch() -> None:
    harness = Harness(lag=1)
    observed_but_not_scored(harness)
    old = harness.on_the_way.pop(0)
    assert old is not None
    harness.planner.restart("a")
    harness.on_the_way.append(None)
    harness.lives["a"] = Life()
    while not harness.lives["a"].observed:
        harness.step("a")
    harness.planner.accept(old)
    assert harness.planner.stats.skipped["stale"] == 1
    assert harness.planner.evictions() == {}
    harness.deliver()
    assert set(harness.planner.evictions()) == {"a"}


def test_scores_that_come_twice_evict_once() -> None:
    harness = Harness(lag=1)
    observed_but_not_scored(harness)
    scores = harness.on_the_way[0]
    assert scores is not None
    harness.deliver()
    assert harness.planner.evictions()
    harness.planner.accept(scores)
    assert harness.planner.evictions() == {}
    assert harness.planner.stats.skipped["stale"] == 1


@pytest.mark.parametrize("end", ["restart", "remove"])
def test_scores_that_arrived_die_with_the_epoch(end: str) -> None:
    harness = Harness()
    observed_but_not_scored(harness)
    getattr(harness.planner, end)("a")
    assert harness.planner.evictions() == {}


@pytest.mark.parametrize("end", ["restart", "remove"])
def test_drops_of_a_request_that_lost_its_table_never_reach_the_worker(end: str) -> None:
    harness = Harness()
    observed_but_not_scored(harness)
    assert harness.planner.evictions()
    getattr(harness.planner, end)("a")  # as vLLM preempts between evictions() and plan()
    assert not harness.planner.plan([])


def test_request_starts_over_after_a_preemption() -> None:
    harness = Harness(score=lambda *_: 0.0)
    harness.add("a", prompt=6, key=3)
    harness.run("a", until=80)
    before = harness.planner.tracks["a"]
    harness.planner.restart("a")
    after = harness.planner.tracks["a"]
    assert after.epoch > before.epoch
    assert (after.holes, after.events, after.survivors, after.slot) == (0, 0, ([],), None)
    assert (after.protected, after.budget, after.due, after.key) == (2, 4, DUE, 3)

    harness.lives["a"] = Life()
    harness.run("a", until=80, tokens=40)  # the prefill of prompt and outputs is evicted as well
    assert [len(blocks) for blocks in harness.lives["a"].dropped] == [4]
    assert harness.lives["a"].dropped[0][0] == 2


def test_restart_and_remove_of_unknown_requests_do_nothing() -> None:
    harness = Harness()
    harness.planner.restart("nobody")
    harness.planner.remove("nobody")
    assert harness.planner.tracks == {}


def test_request_that_opted_out_is_left_alone_and_counted() -> None:
    harness = Harness()
    harness.add("a", evict=False)
    harness.run("a", until=300)
    assert harness.planner.tracks == {}
    assert harness.lives["a"] == Life(num_tokens=300)
    assert harness.planner.stats.skipped == {"opted_out": 1}


def test_own_budget_and_protection_are_used() -> None:
    harness = Harness(score=lambda *_: 0.0)
    harness.add("small", prompt=9, protect="none", budget=8)
    harness.add("large", prompt=9, budget=32)
    harness.run("small", "large", until=200)
    assert harness.lives["small"].observed[0] == 8 + INTERVAL
    assert harness.lives["large"].observed[0] == 12 + 32 + INTERVAL
    assert len(harness.lives["small"].live()) < len(harness.lives["large"].live())


# ---- slots


def test_slot_is_acquired_late_returned_at_the_end_and_reset_for_the_next() -> None:
    harness = Harness(slots=1)
    harness.add("a")
    harness.run("a", until=DUE - WINDOW)
    assert harness.planner.tracks["a"].slot is None
    assert harness.step("a").reset == [0]
    assert harness.step("a").reset == []
    harness.planner.remove("a")
    harness.add("b")
    harness.run("b", until=DUE - WINDOW)
    assert harness.step("b").reset == [0]


def test_slots_never_have_two_owners_and_come_back() -> None:
    rng = random.Random(0)
    harness = Harness(slots=5)
    running: list[str] = []
    for i in range(400):
        if len(running) < 8:
            harness.add(f"r{i}")
            running.append(f"r{i}")
        harness.step(*running)
        owned = [t.slot for t in harness.planner.tracks.values() if t.slot is not None]
        assert len(owned) == len(set(owned))
        assert sorted(owned + harness.planner._free_slots) == list(range(5))
        victim = rng.choice(running)
        event = rng.random()
        if event < 0.05:
            harness.planner.remove(victim)
            running.remove(victim)
        elif event < 0.08:
            harness.planner.restart(victim)
            harness.lives[victim] = Life()
    for request_id in running:
        harness.planner.remove(request_id)
    assert sorted(harness.planner._free_slots) == list(range(5))


def test_request_without_a_slot_is_skipped_counted_and_served_later() -> None:
    harness = Harness(slots=1)
    harness.add("a")
    harness.add("b")
    harness.run("a", "b", until=DUE)
    assert harness.lives["b"].recorded == []
    assert harness.planner.stats.skipped["no_slot"] == WINDOW
    harness.planner.remove("a")
    for _ in range(2 * WINDOW):
        harness.step("b")  # the harness refuses a ring that is not full
    assert harness.lives["b"].dropped


def test_late_slot_is_observed_when_its_ring_is_full_not_before() -> None:
    harness = Harness(slots=1)
    harness.add("a")
    harness.add("b")
    harness.run("a", "b", until=DUE + 10)
    harness.planner.remove("a")
    skipped_at = harness.lives["b"].num_tokens
    plans = [harness.step("b") for _ in range(WINDOW + 1)]
    assert [bool(plan.observe) for plan in plans] == [False] * (WINDOW - 1) + [True, False]
    assert harness.lives["b"].observed == [skipped_at + WINDOW]


# ---- reports


def test_eviction_is_counted_with_its_blocks_tokens_and_live_tokens() -> None:
    harness = Harness()
    harness.add("a", prompt=7)
    harness.run("a", until=8 + DUE + 1)
    stats = harness.planner.stats
    assert (stats.evictions, stats.blocks_freed, stats.tokens_evicted) == (1, 2, 8)
    assert stats.live_tokens == {8 + BUDGET: 1}
    assert sum(stats.eviction_us) >= 1000


def test_step_that_is_due_without_candidates_is_counted_and_the_next_tries_again() -> None:
    # A window as large as the budget (which KVPolicyConfig.check_block_size refuses).
    harness = Harness(window=BUDGET, interval=1)
    harness.add("a")
    harness.run("a", until=BUDGET + 2)
    assert harness.planner.stats.skipped == {"no_candidates": 2}
    assert harness.lives["a"].dropped == []
    harness.run("a", until=BUDGET + BLOCK + 2)
    assert harness.lives["a"].dropped == [[0]]


def overdue(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [r for r in caplog.records if r.name == "vllm.gkv_vllm.engine.planner"]


@pytest.fixture
def planner_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """vLLM's logger does not propagate; read the planner's own."""
    logger = logging.getLogger("vllm.gkv_vllm.engine.planner")
    logger.addHandler(caplog.handler)
    yield caplog  # type: ignore[misc]
    logger.removeHandler(caplog.handler)


def test_overdue_request_is_reported_once(planner_log: pytest.LogCaptureFixture) -> None:
    harness = Harness(slots=0)
    harness.add("starved")
    harness.run("starved", until=OVERDUE_FACTOR * DUE - 1)
    assert not overdue(planner_log)
    harness.run("starved", until=OVERDUE_FACTOR * DUE + 50)
    messages = [record.getMessage() for record in overdue(planner_log)]
    assert len(set(messages)) == 1
    assert "request starved holds 96 unprotected tokens, 4 times" in messages[0]


def test_evicting_request_is_never_reported(planner_log: pytest.LogCaptureFixture) -> None:
    harness = Harness()
    harness.add("a")
    harness.run("a", until=20 * DUE)
    assert not overdue(planner_log)
