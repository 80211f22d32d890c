# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The planner's rules (docs/design.md), on numbers alone: no engine, no torch, no vLLM."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkv_vllm.config import KVPolicyConfig, RequestPolicy
from gkv_vllm.engine.footprint import bounded_blocks
from gkv_vllm.engine.plan import BlockScores, StepPlan
from gkv_vllm.engine.planner import OVERDUE_FACTOR, EvictionPlanner
from gkv_vllm.policies import registry

BLOCK = 4
# In blocks: budget 4, due at 16 + 8 = 24 unprotected tokens; recorded above 24 - 4 = 20.
BUDGET, INTERVAL, WINDOW, DUE = 16, 8, 4, 24

Score = Callable[[str, int, int], float]


def descending(request_id: str, num_tokens: int, block: int) -> float:
    """Newer blocks score lower, so that the newest candidates go first."""
    return -float(block)


def by_chance(request_id: str, num_tokens: int, block: int) -> float:
    return random.Random(f"{request_id} {num_tokens} {block}").random()


@dataclass
class Life:
    """What one request lived through."""

    num_tokens: int = 0
    recorded: list[int] = field(default_factory=list)
    """`num_tokens` of the steps in which it was recorded."""
    observed: list[int] = field(default_factory=list)
    dropped: list[list[int]] = field(default_factory=list)

    def holes(self) -> set[int]:
        return {block for blocks in self.dropped for block in blocks}

    def live(self) -> set[int]:
        return set(range(-(-self.num_tokens // BLOCK))) - self.holes()


class Harness:
    """A planner, and a worker that only keeps track of positions."""

    def __init__(
        self,
        *,
        policy: str = "gkv",
        slots: int = 8,
        score: Score = by_chance,
        window: int = WINDOW,
        interval: int = INTERVAL,
        lag: int = 0,
    ) -> None:
        config = KVPolicyConfig(policy=policy, budget=BUDGET, interval=interval, window=window)
        self.planner = EvictionPlanner(
            config, registry.create(policy, {}), block_size=BLOCK, num_slots=slots
        )
        self.score = score
        self.lag = lag
        """Steps that are scheduled before the scores of one arrive."""
        self.lives: dict[str, Life] = {}
        self.on_the_way: list[BlockScores | None] = [None] * lag
        self.rings: dict[int, dict[int, tuple[str, int]]] = {}

    def add(
        self,
        request_id: str,
        prompt: int = 0,
        *,
        protect: str = "prompt",
        evict: bool = True,
        key: int = 0,
        budget: int = BUDGET,
    ) -> None:
        policy = RequestPolicy(evict=evict, budget=budget, protect=protect)
        self.planner.add(request_id, prompt_tokens=prompt, policy=policy, key=key)
        self.lives[request_id] = Life()

    def step(self, *request_ids: str, tokens: int = 1) -> StepPlan:
        """One engine step in which each of these requests computes `tokens` tokens."""
        victims = self.planner.evictions()
        for request_id in request_ids:
            self.lives[request_id].num_tokens += tokens
        plan = self.planner.plan((id_, self.lives[id_].num_tokens) for id_ in request_ids)
        assert plan.drops == victims
        for request_id, blocks in victims.items():
            self.lives[request_id].dropped.append(blocks)
        self._record(plan, tokens)
        self.on_the_way.append(self._scores(plan))
        self.deliver()
        return plan

    def deliver(self) -> None:
        arrived = self.on_the_way.pop(0)
        if arrived is not None:
            self.planner.accept(arrived)

    def _record(self, plan: StepPlan, tokens: int) -> None:
        window = self.planner.config.window
        for slot in plan.reset:
            self.rings[slot] = {}
        for request_id, recording in plan.record.items():
            self.lives[request_id].recorded.append(recording.num_tokens)
            ring = self.rings[recording.slot]
            first = recording.num_tokens - min(window, tokens)
            for position in range(first, recording.num_tokens):
                ring[position % window] = (request_id, position)

    def _scores(self, plan: StepPlan) -> BlockScores | None:
        scores: dict[str, tuple[int, Sequence[float]]] = {}
        window = self.planner.config.window
        for request_id, seen in plan.observe.items():
            life = self.lives[request_id]
            life.observed.append(seen.num_tokens)
            expected = {(request_id, i) for i in range(seen.num_tokens - window, seen.num_tokens)}
            assert set(self.rings[seen.slot].values()) == expected, "a ring without its window"
            blocks = range(-(-seen.num_tokens // BLOCK))
            holes = life.holes()
            values = [
                0.0 if b in holes else self.score(request_id, seen.num_tokens, b) for b in blocks
            ]
            scores[request_id] = (seen.epoch, values)
        return BlockScores(scores, seconds=1e-3) if scores else None

    def run(self, *request_ids: str, until: int, tokens: int = 1) -> None:
        while any(self.lives[id_].num_tokens < until for id_ in request_ids):
            self.step(*request_ids, tokens=tokens)


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
    policy=st.sampled_from(["gkv", "recency", "random"]),
)
def test_budget_is_kept_exactly_and_the_bound_is_never_passed(
    chunks: list[int],
    prompt: int,
    protect: str,
    interval: int,
    budget: int,
    lag: int,
    policy: str,
) -> None:
    harness = Harness(interval=interval, lag=lag, policy=policy)
    harness.add("a", prompt, protect=protect, budget=budget)
    life, track = harness.lives["a"], harness.planner.tracks["a"]
    for chunk in chunks:
        before = len(life.dropped)
        harness.step("a", tokens=chunk)
        in_flight = max(chunks) * (1 + 2 * lag)
        assert len(life.live()) <= bounded_blocks(track.protected, track.due, in_flight, BLOCK)
        if len(life.dropped) > before and policy == "gkv":
            seen = life.observed[len(life.dropped) - 1]
            counted = [b for b in life.live() if track.protected <= b < -(-seen // BLOCK)]
            assert len(counted) == -(-budget // BLOCK)
    assert len(life.holes()) == sum(map(len, life.dropped)), "a block went twice"


def test_evicted_blocks_are_not_candidates_again() -> None:
    harness = Harness(score=lambda *_: 0.0)
    harness.add("a")
    harness.run("a", until=200)
    gone = [block for blocks in harness.lives["a"].dropped for block in blocks]
    assert len(gone) == len(set(gone)) > 20


# ---- independence


@pytest.mark.parametrize("policy", ["gkv", "recency", "random"])
@pytest.mark.parametrize("lag", [0, 1])
def test_kept_set_does_not_depend_on_neighbours(policy: str, lag: int) -> None:
    alone = Harness(policy=policy, lag=lag)
    alone.add("a", prompt=7, key=11)
    alone.run("a", until=120)
    crowd = Harness(policy=policy, lag=lag)
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


def test_recency_keeps_the_newest() -> None:
    harness = Harness(policy="recency")
    harness.add("a", prompt=5)
    harness.run("a", until=8 + DUE + 1)
    assert harness.lives["a"].dropped == [[2, 3]]
    assert not harness.lives["a"].recorded, "a policy without queries was recorded"


def test_random_draws_depend_on_the_key_and_repeat() -> None:
    def kept(key: int) -> list[list[int]]:
        harness = Harness(policy="random")
        harness.add("a", key=key)
        harness.run("a", until=100)
        return harness.lives["a"].dropped

    assert kept(1) == kept(1)
    assert kept(1) != kept(2)


def test_policies_without_queries_need_no_slot() -> None:
    harness = Harness(policy="recency", slots=0)
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
    assert (after.holes, after.events, after.survivors, after.slot) == (0, 0, [], None)
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


def test_eviction_without_candidates_is_counted_and_forgotten() -> None:
    # A window as large as the budget (which KVPolicyConfig.check_block_size refuses).
    harness = Harness(window=BUDGET, interval=1)
    harness.add("a")
    harness.run("a", until=BUDGET + 2)
    assert harness.planner.stats.skipped == {"no_candidates": 1}
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
