# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Random request streams through vLLM's real schedulers with eviction; every step is audited.

No model runs. A mirror of the worker follows the messages, writes into imaginary blocks and scores
what the plan observes; it knows at any time which bytes each table must name."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from gkv_vllm.config import ConfigError, KVPolicyConfig
from gkv_vllm.engine.footprint import blocks_for, peak_blocks
from gkv_vllm.engine.plan import PLAN_ATTRIBUTE, SCORES_ATTRIBUTE, BlockScores, StepPlan
from gkv_vllm.engine.scheduler import GKVAsyncScheduler, GKVScheduler
from gkv_vllm.engine.spec import in_flight_tokens

BLOCK = 4
MAX_MODEL_LEN = 512
EXACT = "exact"


def token_at(prompt: tuple[int, ...], position: int) -> int:
    """The tokens that the imaginary model generates depend on prompt and position only."""
    if position < len(prompt):
        return prompt[position]
    return (sum(prompt) + position * position) % 50


def score_of(request_id: str, num_tokens: int, block: int) -> float:
    return random.Random(f"{request_id} {num_tokens} {block}").random()


@dataclass
class Row:
    """What the worker knows of one request."""

    prompt: tuple[int, ...]
    table: list[int]
    num_computed: int
    written: list[Any] = field(default_factory=list)
    """Per position, what its KV bytes must be."""


class Worker:
    """Follows SchedulerOutput and StepPlan as vLLM's V1 runner and our Evictor do."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.rows: dict[str, Row] = {}
        self.bytes: dict[tuple[int, int], Any] = {}
        """(block id, offset) -> content."""
        self.rings: dict[int, dict[int, tuple[str, int, int]]] = {}
        self.history: dict[int, int | None] = {}
        """Slot -> epoch whose scores its history holds."""
        self.observed: dict[str, int] = {}

    def step(self, output: Any) -> BlockScores | None:
        plan: StepPlan = getattr(output, PLAN_ATTRIBUTE, None) or StepPlan()
        for request_id, blocks in plan.drops.items():
            self._drop(request_id, blocks)
        for slot in plan.reset:
            self.rings[slot], self.history[slot] = {}, None
        self._update_states(output)
        # A layer writes the keys and values of the whole batch before it attends, so a request may
        # start on blocks that its neighbour fills in the same step.
        for request_id, count in output.num_scheduled_tokens.items():
            self._write(request_id, count)
        for request_id in output.num_scheduled_tokens:
            self._check_bytes(request_id)
        self._record(plan, output.num_scheduled_tokens)
        return self._score(plan)

    def _drop(self, request_id: str, blocks: list[int]) -> None:
        row = self.rows[request_id]
        for block in blocks:
            assert row.table[block] != 0, "a hole was dropped again"
            # The scores that decide were taken at `observed`; policies without have none.
            seen = self.observed.get(request_id, row.num_computed)
            assert (block + 1) * BLOCK <= seen - self.window, "a block of the window was dropped"
            row.table[block] = 0

    def _update_states(self, output: Any) -> None:
        for request_id in output.finished_req_ids:
            self.rows.pop(request_id, None)
            self.observed.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            assert new.req_id not in self.rows
            prompt = tuple(new.prompt_token_ids)
            self.rows[new.req_id] = Row(prompt, list(new.block_ids[0]), new.num_computed_tokens)
            self._adopt_hits(new.req_id)
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            row, new_ids = self.rows[request_id], cached.new_block_ids[i]
            row.num_computed = cached.num_computed_tokens[i]
            if request_id in cached.resumed_req_ids:
                row.table = list(new_ids[0])
                self._adopt_hits(request_id)
            elif new_ids is not None:
                row.table.extend(new_ids[0])

    def _adopt_hits(self, request_id: str) -> None:
        """What was found in the prefix cache must be this prompt's, computed in full."""
        row = self.rows[request_id]
        row.written = []
        for _ in range(row.num_computed):
            self._append(row, EXACT)

    def _append(self, row: Row, context: Any) -> Any:
        """The content of the next position: all tokens up to it, and what they could see."""
        before = row.written[-1][0] if row.written else 0
        token = token_at(row.prompt, len(row.written))
        row.written.append((hash((before, token)), context))
        return row.written[-1]

    def _write(self, request_id: str, count: int) -> None:
        row = self.rows[request_id]
        holes = tuple(i for i, block_id in enumerate(row.table) if block_id == 0)
        inexact = holes or any(content[1] != EXACT for content in row.written)
        context = (request_id, row.num_computed, holes) if inexact else EXACT
        for position in range(row.num_computed, row.num_computed + count):
            block_id = row.table[position // BLOCK]
            assert block_id != 0, "a step writes into a hole"
            self.bytes[block_id, position % BLOCK] = self._append(row, context)
        row.num_computed += count

    def _check_bytes(self, request_id: str) -> None:
        row = self.rows[request_id]
        assert len(row.written) == row.num_computed
        for position, content in enumerate(row.written):
            block_id = row.table[position // BLOCK]
            if block_id:
                assert self.bytes[block_id, position % BLOCK] == content, "foreign bytes"

    def _record(self, plan: StepPlan, scheduled: dict[str, int]) -> None:
        assert set(plan.record) <= set(scheduled)
        for request_id, recording in plan.record.items():
            row = self.rows[request_id]
            assert recording.num_tokens == row.num_computed
            first = recording.num_tokens - min(self.window, scheduled[request_id])
            for position in range(first, recording.num_tokens):
                self.rings[recording.slot][position % self.window] = (request_id, position)

    def _score(self, plan: StepPlan) -> BlockScores | None:
        scores = {}
        for request_id, seen in plan.observe.items():
            row, n = self.rows[request_id], seen.num_tokens
            expected = {(request_id, p) for p in range(n - self.window, n)}
            assert set(self.rings[seen.slot].values()) == expected, "a ring without its window"
            assert self.history[seen.slot] in (None, seen.epoch), "another one's score history"
            self.history[seen.slot] = seen.epoch
            self.observed[request_id] = n
            live = row.table[: blocks_for(n, BLOCK)]
            by_block = [score_of(request_id, n, b) if id_ else 0.0 for b, id_ in enumerate(live)]
            scores[request_id] = (seen.epoch, by_block)
        return BlockScores(scores, seconds=1e-4) if scores else None


class Engine:
    """vLLM's EngineCore loop around a real scheduler, with an audit after every step."""

    def __init__(
        self,
        config: Any,
        kv_cache_config: Any,
        new_request: Callable[..., Any],
    ) -> None:
        cls = GKVAsyncScheduler if config.scheduler_config.async_scheduling else GKVScheduler
        self.scheduler = cls(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=True,
        )
        self.depth = config.max_concurrent_batches
        self.config = config
        self.policy: KVPolicyConfig = self.scheduler.kv_policy
        self.planner = self.scheduler.planner
        self.new_request = new_request
        self.worker = Worker(self.policy.window)
        self.in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
        (self.group,) = self.scheduler.evicting_managers
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.usable = kv_cache_config.num_blocks - 1
        self.requests: dict[str, Any] = {}
        self.aborted: set[str] = set()
        self.starved: set[str] = set()
        self.kept: dict[str, list[list[int]]] = {}
        self.steps = 0

    # ---- requests

    def add(
        self, request_id: str, prompt: list[int], max_tokens: int, extra: dict[str, Any]
    ) -> bool:
        """Add a request unless the front end would refuse it (HTTP 400) or its id is in use."""
        busy = any(request_id in output.num_scheduled_tokens for output, _ in self.in_flight)
        if busy or request_id in self.scheduler.requests:
            return False
        request = self.new_request(
            request_id, prompt, max_tokens=max_tokens, block_size=BLOCK, extra_args=extra
        )
        if self.peak(request) > self.usable:
            return False
        self.requests[request_id] = request
        self.aborted.discard(request_id)
        self.starved.discard(request_id)
        self.scheduler.add_request(request)
        return True

    def peak(self, request: Any) -> int:
        """What the front end admits against the pool (plugin.py)."""
        return peak_blocks(
            self.policy.for_request(request.sampling_params.extra_args, BLOCK),
            prompt_tokens=request.num_prompt_tokens,
            max_tokens=request.max_tokens,
            block_size=BLOCK,
            interval=self.policy.interval,
            in_flight_tokens=in_flight_tokens(self.config),
        )

    def abort(self, request_id: str) -> None:
        if request_id in self.scheduler.requests:
            self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
            self.aborted.add(request_id)
            self.audit()

    def reset_prefix_cache(self, preempting: bool) -> None:
        self.scheduler.reset_prefix_cache(reset_running_requests=preempting)
        self.audit()

    # ---- steps

    def step(self) -> None:
        """As EngineCore.step, or step_with_batch_queue when two batches may be in flight."""
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.steps += 1
            self.in_flight.append((output, self._execute(output)))
            self._audit_schedule(output)
            if len(self.in_flight) < self.depth:
                return
        if self.in_flight:
            self.scheduler.update_from_output(*self.in_flight.popleft())
            self.audit()

    def _execute(self, output: Any) -> ModelRunnerOutput:
        scores = self.worker.step(output)
        ids = list(output.num_scheduled_tokens)
        sampled = []
        for request_id in ids:
            request, row = self.scheduler.requests[request_id], self.worker.rows[request_id]
            done = not request.is_prefill_chunk
            sampled.append([token_at(row.prompt, row.num_computed)] if done else [])
        result = ModelRunnerOutput(ids, {id_: i for i, id_ in enumerate(ids)}, sampled)
        if scores is not None:
            setattr(result, SCORES_ATTRIBUTE, scores)
        return result

    def finish(self, limit: int = 20_000) -> None:
        """Run until nothing is left, then check that nothing stayed behind."""
        for _ in range(limit):
            if not self.in_flight and not self.scheduler.has_requests():
                break
            self.step()
        assert not self.scheduler.has_requests(), "the engine makes no progress"
        for request_id, request in self.requests.items():
            if request_id not in self.aborted:
                assert len(request.output_token_ids) == request.max_tokens
        assert self.pool.get_num_free_blocks() == self.usable
        assert self.planner.tracks == {}
        assert sorted(self.planner._free_slots) == list(range(len(self.planner._free_slots)))
        for leftover in ("req_to_blocks", "_admission_blocks", "_exact_tokens"):
            assert not getattr(self.group, leftover), leftover

    # ---- audits

    def _audit_schedule(self, output: Any) -> None:
        plan: StepPlan = getattr(output, PLAN_ATTRIBUTE, None) or StepPlan()
        for request_id, blocks in plan.drops.items():
            self.kept.setdefault(request_id, []).append(blocks)
            # A policy that ranks by position does not wait for the step it ranks after; steps run
            # in order, so whoever gets the block writes later.
            if self.planner.policy.needs_queries:
                first_written = min(self._first_writes(request_id))
                assert (max(blocks) + 1) * BLOCK <= first_written, "a block in use was freed"
        for request_id in output.num_scheduled_tokens:
            self._note_starvation(request_id, plan)
        for request in self.scheduler.running:
            assert self.worker.rows[request.request_id].table == self.table(request.request_id)
        self.audit()

    def _first_writes(self, request_id: str) -> Iterator[int]:
        """Where each step in flight starts to write into this request's blocks."""
        request = self.scheduler.requests[request_id]
        end = request.num_computed_tokens
        for output, _ in reversed(self.in_flight):
            end -= output.num_scheduled_tokens.get(request_id, 0)
            yield end

    def _note_starvation(self, request_id: str, plan: StepPlan) -> None:
        track = self.planner.tracks.get(request_id)
        if track is None or request_id in plan.record or not self.planner.policy.needs_queries:
            return
        tokens = self.scheduler.requests[request_id].num_computed_tokens
        if track.unprotected(tokens, BLOCK) > track.due - self.policy.window:
            self.starved.add(request_id)

    def table(self, request_id: str) -> list[int]:
        return [block.block_id for block in self.group.req_to_blocks.get(request_id, ())]

    def audit(self) -> None:
        """What must hold between any two calls into the scheduler."""
        self._audit_blocks()
        self._audit_slots()
        for request_id, blocks in self.group.req_to_blocks.items():
            self._audit_request(request_id, [block.block_id for block in blocks])

    def _audit_blocks(self) -> None:
        held: Counter[int] = Counter()
        for table in self.group.req_to_blocks.values():
            held.update(block.block_id for block in table if not block.is_null)
        free = {block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()}
        assert len(free) == self.pool.get_num_free_blocks()
        assert len(free) + len(held) == self.usable
        assert not free & set(held)
        assert all(block.ref_cnt == held[block.block_id] for block in self.pool.blocks[1:])
        for key, cached in self.pool.cached_block_hash_to_block._cache.items():
            for block in cached.values() if isinstance(cached, dict) else [cached]:
                assert block.block_hash == key
                assert not block.is_null

    def _audit_slots(self) -> None:
        owned = [t.slot for t in self.planner.tracks.values() if t.slot is not None]
        assert len(owned) == len(set(owned))
        assert not set(owned) & set(self.planner._free_slots)
        assert set(self.planner.tracks) <= set(self.scheduler.requests)

    def _audit_request(self, request_id: str, table: list[int]) -> None:
        request, track = self.scheduler.requests[request_id], self.planner.tracks.get(request_id)
        held = sum(block_id != 0 for block_id in table)
        if track is None:
            assert held == len(table), "a request that opted out lost blocks"
            return
        assert all(table[: track.protected]), "a protected block was freed"
        assert len(table) - held == track.holes
        newest = max(0, request.num_computed_tokens - self.policy.window) // BLOCK
        assert all(table[newest:]), "a block of the window was freed"
        if request_id not in self.starved:
            assert held <= self.peak(request), "a request passed its bound"


# ---- fixtures and strategies

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def make_engine(
    vllm_config: Callable[..., Any],
    kv_cache_config: Callable[..., Any],
    new_request: Callable[..., Any],
) -> MakeEngine:
    def make(
        *,
        asynchronous: bool = False,
        pool: int = 64,
        chunk: int = 16,
        max_num_seqs: int = 4,
        caching: bool = True,
        threshold: int = 0,
        **policy: Any,
    ) -> Engine:
        settings = {"policy": "gkv", "budget": 16, "interval": 8, "window": 4, **policy}
        config = vllm_config(
            settings,
            block_size=BLOCK,
            num_blocks=pool + 1,
            max_model_len=MAX_MODEL_LEN,
            caching=caching,
            async_scheduling=asynchronous,
            max_num_batched_tokens=chunk,
            max_num_seqs=max_num_seqs,
            long_prefill_token_threshold=threshold,
        )
        cache = kv_cache_config(settings, block_size=BLOCK, num_blocks=pool + 1)
        return Engine(config, cache, new_request)

    return make


def prompt_of(family: int, length: int) -> list[int]:
    """Prompts of one family share their beginning."""
    return [random.Random(f"{family} {i}").randrange(50) for i in range(length)]


policies = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(["gkv", "gkv", "recency", "random"]),
        "window": st.integers(1, 8),
        "interval": st.integers(1, 12),
        "budget": st.integers(13, 28),
        "protect": st.sampled_from(["prompt", "sinks", "none"]),
        "min_budget": st.sampled_from([None, 13]),
    }
)
engines = st.fixed_dictionaries(
    {
        "pool": st.integers(14, 44),
        "chunk": st.sampled_from([4, 7, 16, 40]),
        "max_num_seqs": st.sampled_from([1, 4, 8]),
        "caching": st.sampled_from([True, True, True, False]),
        "threshold": st.sampled_from([0, 0, 5]),
    }
)
overrides = st.sampled_from(
    [{}, {}, {}, {"kv_policy": "none"}, {"kv_budget": 13}, {"kv_budget": 40}]
    + [{"kv_protect": kind} for kind in ("prompt", "sinks", "none")]
)
adds = st.tuples(
    st.just("add"),
    st.integers(0, 2),  # family
    st.integers(1, 70),  # prompt
    st.integers(1, 160),  # max_tokens
    overrides,
    st.sampled_from([1, 1, 1, 2, 3]),  # siblings
)
follows = st.tuples(st.just("follow"), st.integers(0, 20), st.integers(1, 40), overrides)
operations = st.lists(
    st.one_of(
        adds,
        adds,
        follows,
        st.tuples(st.just("step"), st.integers(1, 40)),
        st.tuples(st.just("step"), st.integers(1, 40)),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("reset"), st.booleans()),
        st.tuples(st.just("again"), st.integers(0, 20)),
    ),
    min_size=4,
    max_size=30,
)


def play(engine: Engine, stream: list[tuple[Any, ...]]) -> None:
    added: list[tuple[Any, ...]] = []
    for number, (name, *numbers) in enumerate(stream):
        if name == "add":
            family, length, max_tokens, extra, siblings = numbers
            for i in range(siblings):
                arguments = (f"{i}_{number}", prompt_of(family, length), max_tokens, extra)
                if engine.add(*arguments):
                    added.append(arguments)
        elif name == "step":
            for _ in range(numbers[0]):
                engine.step()
        elif name == "reset":
            engine.reset_prefix_cache(preempting=numbers[0])
        elif added and name == "follow":
            which, max_tokens, extra = numbers
            before = engine.requests[added[which % len(added)][0]].all_token_ids
            arguments = (f"f_{number}", [*before, 1, 2], max_tokens, extra)
            if engine.add(*arguments):
                added.append(arguments)
        elif added and name == "abort":
            engine.abort(added[numbers[0] % len(added)][0])
        elif added:
            engine.add(*added[numbers[0] % len(added)])
    engine.finish()


def simulate(
    make_engine: MakeEngine,
    asynchronous: bool,
    engine_settings: dict[str, Any],
    policy: dict[str, Any],
    stream: list[tuple[Any, ...]],
) -> None:
    engine = make_engine(asynchronous=asynchronous, **engine_settings, **policy)
    play(engine, stream)
    stats = engine.planner.stats
    event(f"evictions: {min(stats.evictions, 3)}")
    event(f"preemptions: {any(r.num_preemptions for r in engine.requests.values())}")
    event(f"no_slot: {stats.skipped['no_slot'] > 0}")
    event(f"stale: {stats.skipped['stale'] > 0}")
    assert stats.skipped["no_candidates"] == 0


random_streams = settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@random_streams
@given(engine_settings=engines, policy=policies, stream=operations)
def test_synchronous_engine_keeps_its_accounts(
    make_engine: MakeEngine,
    engine_settings: dict[str, Any],
    policy: dict[str, Any],
    stream: list[tuple[Any, ...]],
) -> None:
    simulate(make_engine, False, engine_settings, policy, stream)


@random_streams
@given(engine_settings=engines, policy=policies, stream=operations)
def test_asynchronous_engine_keeps_its_accounts(
    make_engine: MakeEngine,
    engine_settings: dict[str, Any],
    policy: dict[str, Any],
    stream: list[tuple[Any, ...]],
) -> None:
    simulate(make_engine, True, engine_settings, policy, stream)


# ---- directed


@pytest.mark.parametrize("policy", ["gkv", "recency", "random"])
@pytest.mark.parametrize("prompt", [1, 16, 63])
def test_both_schedulers_keep_the_same_blocks(
    make_engine: MakeEngine, policy: str, prompt: int
) -> None:
    kept = []
    for asynchronous in (False, True):
        engine = make_engine(asynchronous=asynchronous, policy=policy, chunk=64)
        assert engine.add("a", prompt_of(0, prompt), 150, {})
        engine.finish()
        kept.append(engine.kept["a"])
    shortest = min(map(len, kept))
    assert shortest > 10
    assert kept[0][:shortest] == kept[1][:shortest]
    assert abs(len(kept[0]) - len(kept[1])) <= 1, "the last one may come too late"


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("policy", ["gkv", "recency"])
@pytest.mark.parametrize("protect", ["prompt", "sinks", "none"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_preempted_request_always_fits_again(
    make_engine: MakeEngine, asynchronous: bool, protect: str, policy: str, caching: bool
) -> None:
    numbers: dict[str, Any] = {
        "asynchronous": asynchronous,
        "protect": protect,
        "policy": policy,
        "caching": caching,
    }
    prompt = prompt_of(0, 21)
    roomy = make_engine(**numbers, pool=500)
    bound = roomy.peak(roomy.new_request("a", prompt, max_tokens=300, block_size=BLOCK))
    engine = make_engine(**numbers, pool=bound)
    assert engine.add("a", prompt, 300, {})
    request = engine.requests["a"]
    for preemptions in range(1, 6):
        while request.num_tokens < (bound * BLOCK + 20) + 30 * preemptions:
            engine.step()
        engine.reset_prefix_cache(preempting=True)
        assert request.num_preemptions == preemptions
        assert not engine.table("a")
    engine.finish()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_requests_that_preempt_each_other_all_finish(
    make_engine: MakeEngine, asynchronous: bool
) -> None:
    engine = make_engine(asynchronous=asynchronous, pool=26, chunk=16)
    for i in range(6):
        assert engine.add(f"r{i}", prompt_of(i, 20 + i), 200, {})
    engine.finish()
    assert sum(request.num_preemptions for request in engine.requests.values()) > 0
    assert all(len(engine.kept[f"r{i}"]) > 5 for i in range(6))


@pytest.mark.parametrize("protect", ["sinks", "none"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_cached_prefix_larger_than_the_bound_does_not_break_it(
    make_engine: MakeEngine, asynchronous: bool, protect: str
) -> None:
    engine = make_engine(asynchronous=asynchronous, pool=24, chunk=16)
    tokens = prompt_of(0, 24 * BLOCK - 1)
    assert engine.add("whole", tokens, 1, {"kv_policy": "none"})
    engine.finish()
    # Every block of the pool holds a part of this prompt; the mirror checks the rings, too.
    assert engine.add("evicting", [*tokens, 7, 7, 7], 40, {"kv_protect": protect})
    engine.step()
    assert engine.planner.tracks["evicting"].holes == 0
    assert engine.worker.rows["evicting"].num_computed > 16, "nothing of the prefix was used"
    engine.finish()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_next_turn_finds_only_what_was_computed_with_the_full_context(
    make_engine: MakeEngine, asynchronous: bool
) -> None:
    engine = make_engine(asynchronous=asynchronous, pool=80, chunk=64)
    assert engine.add("turn 1", prompt_of(0, 21), 120, {})
    engine.finish()
    evictions = engine.planner.stats.evictions
    conversation = list(engine.requests["turn 1"].all_token_ids)
    assert engine.add("turn 2", [*conversation, 1, 2, 3], 8, {"kv_policy": "none"})
    output = engine.scheduler.schedule()
    (new,) = output.scheduled_new_reqs
    # 24 protected tokens, due after 24 more; one more step starts before asynchronous scores come.
    assert evictions > 5
    assert new.num_computed_tokens == 48
    engine.worker.step(output)  # the mirror compares the bytes


def test_cached_prompt_is_used_whole_when_it_is_protected(make_engine: MakeEngine) -> None:
    engine = make_engine(chunk=64)
    prompt = prompt_of(0, 101)
    for request_id in ("first", "second"):
        assert engine.add(request_id, prompt, 4, {})
        engine.step()
    assert engine.table("first")[:25] == engine.table("second")[:25]
    engine.finish()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_siblings_keep_their_shared_blocks_when_one_evicts(
    make_engine: MakeEngine, asynchronous: bool
) -> None:
    engine = make_engine(asynchronous=asynchronous, pool=64, chunk=64, protect="none")
    prompt = prompt_of(0, 20)
    assert engine.add("short", prompt, 3, {"kv_policy": "none"})
    engine.step()
    for i in range(3):
        assert engine.add(f"r{i}", prompt, 60, {})
    engine.finish()
    assert all(engine.kept[f"r{i}"] for i in range(3))


@pytest.mark.parametrize("event", ["abort", "preempt"])
def test_scores_of_a_request_that_has_moved_on_are_dropped(
    make_engine: MakeEngine, event: str
) -> None:
    engine = make_engine(asynchronous=True)
    assert engine.add("a", prompt_of(0, 5), 100, {})
    while not any(
        getattr(result, SCORES_ATTRIBUTE, None) is not None for _, result in engine.in_flight
    ):
        engine.step()
    if event == "abort":
        engine.abort("a")
    else:
        engine.reset_prefix_cache(preempting=True)
    engine.finish()
    assert engine.planner.stats.skipped["stale"] == 1
    assert bool(engine.planner.stats.evictions) == (event == "preempt")


def test_request_without_a_slot_waits_for_one(make_engine: MakeEngine) -> None:
    engine = make_engine(pool=14, min_budget=16, max_num_seqs=8, protect="none", chunk=8)
    # Three slots, and four requests that share what they hold.
    prompt = prompt_of(0, 21)
    for i in range(4):
        assert engine.add(f"r{i}", prompt, 40, {})
    engine.finish()
    assert engine.planner.stats.skipped["no_slot"] > 0


def test_statistics_reach_vllm(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert engine.add("a", prompt_of(0, 5), 60, {})
    sent: Counter[str] = Counter()
    make_stats = engine.scheduler.make_stats

    def spy(*args: Any, **kwargs: Any) -> Any:
        stats = make_stats(*args, **kwargs)
        sent.update(stats.num_kv_fetch_reqs_by_stage)
        return stats

    engine.scheduler.make_stats = spy  # type: ignore[method-assign]
    engine.finish()
    assert sent["gkv:evictions"] == engine.planner.stats.evictions > 2
    assert sent["gkv:blocks_freed"] == engine.planner.stats.blocks_freed


def test_budget_that_the_pool_cannot_reach_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match="= 24 tokens in whole blocks, but the KV cache holds 20"):
        make_engine(pool=5)


def test_scheduler_needs_an_evictable_layer(
    vllm_config: Callable[..., Any], kv_cache_config: Callable[..., Any]
) -> None:
    policy = {"policy": "gkv", "budget": 16, "interval": 8, "window": 4}
    config = vllm_config(policy, block_size=BLOCK, num_blocks=64)
    cache = kv_cache_config(policy, block_size=BLOCK, num_blocks=64)
    spec = cache.kv_cache_groups[0].kv_cache_spec
    stock = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=spec.dtype)
    cache.kv_cache_groups[0].kv_cache_spec = stock
    with pytest.raises(ConfigError, match="no full-attention layer whose KV cache"):
        GKVScheduler(config, cache, StructuredOutputManager(config), block_size=BLOCK)
