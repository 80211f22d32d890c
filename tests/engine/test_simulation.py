# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Random request streams through vLLM's real schedulers with eviction; every step is audited."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.structured_output import StructuredOutputManager

from gkv_vllm.config import ConfigError
from gkv_vllm.engine.plan import REPORT_ATTRIBUTE
from gkv_vllm.engine.scheduler import GKVScheduler

from .audited_engine import Engine
from .simulation import BLOCK

MAX_MODEL_LEN = 512

Settings = dict[str, Any]

SHAPES: dict[str, Settings] = {
    "blocks": {},
    "blocks of two layer groups": {"layer_groups": (0, 1)},
    "blocks of two layer groups, three tables": {"layer_groups": (0, 1, 1)},
    "blocks by attention": {"policy": "h2o"},
    "tokens": {"granularity": "token"},
    "tokens, two tables": {"granularity": "token", "layer_groups": (0, 0)},
    "tokens by attention": {"granularity": "token", "policy": "h2o"},
}
"""Granularity, policy and the layer group of each KV cache group."""

shapes = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
schedulers = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


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
        layer_groups: tuple[int, ...] = (0,),
        **policy: Any,
    ) -> Engine:
        """pool: usable blocks for each KV cache group."""
        settings = {
            "policy": "gkv",
            "granularity": "block",
            "budget": 16,
            "interval": 8,
            "window": 4,
            **policy,
        }
        settings["layer_groups"] = len(set(layer_groups))
        num_blocks = pool * len(layer_groups) + 1
        config = vllm_config(
            settings,
            block_size=BLOCK,
            num_blocks=num_blocks,
            max_model_len=MAX_MODEL_LEN,
            caching=caching,
            async_scheduling=asynchronous,
            max_num_batched_tokens=chunk,
            max_num_seqs=max_num_seqs,
            long_prefill_token_threshold=threshold,
        )
        cache = kv_cache_config(
            settings, block_size=BLOCK, num_blocks=num_blocks, layer_groups=layer_groups
        )
        return Engine(config, cache, new_request)

    return make


def prompt_of(family: int, length: int) -> list[int]:
    """Prompts of one family share their beginning."""
    return [random.Random(f"{family} {i}").randrange(50) for i in range(length)]


policies = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(["gkv", "gkv", "snapkv", "recency", "random"]),
        "window": st.integers(1, 8),
        "interval": st.integers(1, 12),
        "budget": st.integers(13, 28),
        "protect": st.sampled_from(["prompt", "sinks", "none", "none"]),
        "min_budget": st.sampled_from([None, 13]),
    }
)
engines = st.fixed_dictionaries(
    {
        "pool": st.sampled_from([16, 20, 26, 34, 44]),
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
    # Sampled, since Hypothesis prefers small integers, and small requests are never evicted.
    st.sampled_from([1, 7, 20, 33, 48, 66]),  # prompt
    st.sampled_from([1, 30, 60, 90, 150]),  # max_tokens
    overrides,
    st.sampled_from([1, 1, 2, 3]),  # siblings
)
follows = st.tuples(st.just("follow"), st.integers(0, 20), st.integers(1, 40), overrides)
operations = st.lists(
    st.one_of(
        adds,
        adds,
        follows,
        st.tuples(st.just("step"), st.sampled_from([1, 5, 20, 40])),
        st.tuples(st.just("step"), st.integers(1, 40)),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("reset"), st.booleans()),
        st.tuples(st.just("again"), st.integers(0, 20)),
    ),
    min_size=8,
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


random_streams = settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@shapes
@schedulers
@random_streams
@given(engine_settings=engines, policy=policies, stream=operations)
def test_engine_keeps_its_accounts(
    make_engine: MakeEngine,
    shape: Settings,
    asynchronous: bool,
    engine_settings: Settings,
    policy: Settings,
    stream: list[tuple[Any, ...]],
) -> None:
    engine = make_engine(asynchronous=asynchronous, **{**engine_settings, **policy, **shape})
    play(engine, stream)
    stats = engine.planner.stats
    event(f"evictions: {min(stats.evictions, 3)}")
    event(f"preemptions: {any(r.num_preemptions for r in engine.requests.values())}")
    event(f"fresh blocks: {engine.fresh > 0}")
    for reason in ("no_slot", "no_free_block", "stale"):
        event(f"{reason}: {stats.skipped[reason] > 0}")
    assert stats.skipped["no_candidates"] == 0


# ---- directed


@shapes
@schedulers
def test_all_requests_finish_when_they_want_four_times_the_pool(
    make_engine: MakeEngine, shape: Settings, asynchronous: bool
) -> None:
    engine = make_engine(asynchronous=asynchronous, pool=26, max_num_seqs=8, **shape)
    rng, wanted = random.Random(0), 0
    names = [f"r{i}" for i in range(16)]
    for i, name in enumerate(names):
        # Three families share prompts; every fourth request protects nothing of its own.
        extra = {"kv_protect": "none"} if i % 4 == 0 else {}
        assert engine.add(name, prompt_of(i % 3, 20 + 5 * (i % 2)), 90, extra)
        wanted += engine.peak(engine.requests[name])
    assert wanted > 4 * 26
    for _ in range(6):
        for _ in range(25):
            engine.step()
        engine.abort(rng.choice(names))
    engine.finish()
    assert sum(request.num_preemptions for request in engine.requests.values()) > 0
    assert len(engine.aborted) > 2
    assert all(engine.kept[name] for name in set(names) - engine.aborted)


@pytest.mark.parametrize("policy", ["gkv", "recency", "h2o"])
@pytest.mark.parametrize("granularity", ["block", "token"])
@pytest.mark.parametrize("prompt", [1, 16, 63])
def test_both_schedulers_keep_the_same(
    make_engine: MakeEngine, granularity: str, policy: str, prompt: int
) -> None:
    kept, moved = [], []
    for asynchronous in (False, True):
        engine = make_engine(
            asynchronous=asynchronous, granularity=granularity, policy=policy, chunk=64
        )
        assert engine.add("a", prompt_of(0, prompt), 150, {})
        engine.finish()
        kept.append(engine.kept["a"])
        moved.append(engine.worker.moved["a"])
    shortest = min(map(len, kept))
    assert shortest > 10
    assert kept[0][:shortest] == kept[1][:shortest]
    assert abs(len(kept[0]) - len(kept[1])) <= 1, "the last one may come too late"
    assert moved[0][:shortest] == moved[1][:shortest]
    assert bool(moved[0]) == (granularity == "token")


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("protect", ["prompt", "sinks", "none"])
@shapes
@schedulers
def test_preempted_request_always_fits_again(
    make_engine: MakeEngine, asynchronous: bool, shape: Settings, protect: str, caching: bool
) -> None:
    numbers = {"asynchronous": asynchronous, "protect": protect, "caching": caching, **shape}
    prompt = prompt_of(0, 21)
    roomy = make_engine(**numbers, pool=500)
    bound = roomy.peak(roomy.new_request("a", prompt, max_tokens=300, block_size=BLOCK))
    engine = make_engine(**numbers, pool=bound)
    assert engine.add("a", prompt, 300, {})
    request = engine.requests["a"]
    for preemptions in range(1, 4):
        while request.num_tokens < (bound * BLOCK + 20) + 30 * preemptions:
            engine.step()
        engine.reset_prefix_cache(preempting=True)
        assert request.num_preemptions == preemptions
        assert not any(engine.tables("a"))
    engine.finish()


@shapes
@schedulers
def test_requests_that_preempt_each_other_all_finish(
    make_engine: MakeEngine, asynchronous: bool, shape: Settings
) -> None:
    engine = make_engine(asynchronous=asynchronous, pool=26, chunk=16, **shape)
    for i in range(6):
        assert engine.add(f"r{i}", prompt_of(i, 20 + i), 120, {})
    engine.finish()
    assert sum(request.num_preemptions for request in engine.requests.values()) > 0
    assert all(len(engine.kept[f"r{i}"]) > 5 for i in range(6))


# ---- directed: what is shared


@pytest.mark.parametrize("granularity", ["block", "token"])
@pytest.mark.parametrize("protect", ["sinks", "none"])
@schedulers
def test_cached_prefix_larger_than_the_bound_does_not_break_it(
    make_engine: MakeEngine, asynchronous: bool, protect: str, granularity: str
) -> None:
    engine = make_engine(asynchronous=asynchronous, pool=24, chunk=16, granularity=granularity)
    tokens = prompt_of(0, 24 * BLOCK - 1)
    assert engine.add("whole", tokens, 1, {"kv_policy": "none"})
    engine.finish()
    # Every block of the pool holds a part of this prompt; the worker checks the rings, too.
    assert engine.add("evicting", [*tokens, 7, 7, 7], 40, {"kv_protect": protect})
    engine.step()
    assert engine.planner.tracks["evicting"].holes == 0
    assert engine.worker.rows["evicting"].num_computed > 16, "nothing of the prefix was used"
    engine.finish()


@pytest.mark.parametrize(("protect", "usable"), [("prompt", 100), ("sinks", 4), ("none", 0)])
def test_attention_of_found_tokens_is_never_missing(
    make_engine: MakeEngine, protect: str, usable: int
) -> None:
    engine = make_engine(policy="h2o", protect=protect, chunk=16)
    prompt = prompt_of(0, 101)
    assert engine.add("first", prompt, 1, {"kv_policy": "none"})
    engine.finish()
    assert engine.add("second", prompt, 40, {})
    engine.step()
    assert engine.worker.rows["second"].num_computed == min(101, usable + 16)
    engine.finish()  # the worker compares how many queries every candidate was seen by
    assert engine.kept["second"]


@pytest.mark.parametrize(
    ("granularity", "found"),
    # 24 protected tokens, due after 24 more; one more step starts before asynchronous scores come.
    # Tokens that survive go into the first unprotected blocks.
    [("block", 48), ("token", 24)],
)
@schedulers
def test_next_turn_finds_only_what_was_computed_with_the_full_context(
    make_engine: MakeEngine, asynchronous: bool, granularity: str, found: int
) -> None:
    engine = make_engine(asynchronous=asynchronous, pool=80, chunk=64, granularity=granularity)
    assert engine.add("turn 1", prompt_of(0, 21), 120, {})
    engine.finish()
    assert engine.planner.stats.evictions > 5
    conversation = list(engine.requests["turn 1"].all_token_ids)
    assert engine.add("turn 2", [*conversation, 1, 2, 3], 8, {"kv_policy": "none"})
    output = engine.scheduler.schedule()
    (new,) = output.scheduled_new_reqs
    assert new.num_computed_tokens == found
    engine.worker.step(output)  # it compares the bytes


def test_cached_prompt_is_used_whole_when_it_is_protected(make_engine: MakeEngine) -> None:
    engine = make_engine(chunk=64)
    prompt = prompt_of(0, 101)
    for request_id in ("first", "second"):
        assert engine.add(request_id, prompt, 4, {})
        engine.step()
    assert engine.tables("first")[0][:25] == engine.tables("second")[0][:25]
    engine.finish()


@shapes
@schedulers
def test_siblings_keep_their_shared_blocks_when_one_evicts(
    make_engine: MakeEngine, asynchronous: bool, shape: Settings
) -> None:
    engine = make_engine(asynchronous=asynchronous, pool=64, chunk=64, protect="none", **shape)
    prompt = prompt_of(0, 20)
    assert engine.add("whole", prompt, 60, {"kv_policy": "none"})
    engine.step()
    for i in range(3):
        assert engine.add(f"r{i}", prompt, 60, {})
    engine.finish()
    assert all(engine.kept[f"r{i}"] for i in range(3))
    moves_shared = engine.policy.moves_tokens and not engine.planner.needs.attention_mass
    assert bool(engine.fresh) == moves_shared


@pytest.mark.parametrize("shared_table", [0, 1])
def test_block_shared_in_one_table_is_replaced_in_all(
    make_engine: MakeEngine, shared_table: int
) -> None:
    engine = make_engine(
        chunk=64, protect="none", granularity="token", layer_groups=(0, 0), pool=64
    )
    prompt = prompt_of(0, 20)
    assert engine.add("first", prompt, 1, {"kv_policy": "none"})
    engine.step()
    # Of the first request the cache keeps one table, so the second computes the prompt again.
    engine.scheduler.kv_cache_manager.evict_blocks(set(engine.cached_ids(shared_table)))
    assert engine.add("second", prompt, 60, {"kv_policy": "none"})
    engine.step()
    assert engine.add("r", prompt, 60, {})
    engine.step()
    private = [manager.private("r", range(4)) for manager in engine.managers]
    assert private[shared_table] == [False] * 4
    assert private[1 - shared_table] == [True] * 4
    engine.finish()
    assert engine.fresh > 0
    assert engine.kept["r"]


@schedulers
def test_request_that_finds_no_block_for_its_survivors_waits_for_one(
    make_engine: MakeEngine, asynchronous: bool
) -> None:
    # Siblings share four blocks and hold two of their own when they fall due; that is all there is.
    siblings = 9 if asynchronous else 3
    engine = make_engine(
        asynchronous=asynchronous,
        pool=4 + 2 * siblings,
        chunk=20 if asynchronous else 16,
        max_num_seqs=siblings,
        protect="none",
        granularity="token",
    )
    prompt = prompt_of(0, 20)
    assert engine.add("r0", prompt, 60, {})
    engine.step()
    for i in range(1, siblings):
        assert engine.add(f"r{i}", prompt, 60, {})
    engine.finish()
    assert engine.planner.stats.skipped["no_free_block"] > 0
    assert all(engine.kept[f"r{i}"] for i in range(siblings))


# ---- directed: requests that moved on, reports


@pytest.mark.parametrize("event", ["abort", "preempt"])
def test_scores_of_a_request_that_has_moved_on_are_dropped(
    make_engine: MakeEngine, event: str
) -> None:
    engine = make_engine(asynchronous=True)
    assert engine.add("a", prompt_of(0, 5), 100, {})
    while not any(
        getattr(result, REPORT_ATTRIBUTE, None) is not None for _, result in engine.in_flight
    ):
        engine.step()
    if event == "abort":
        engine.abort("a")
    else:
        engine.reset_prefix_cache(preempting=True)
    engine.finish()
    assert engine.planner.stats.skipped["stale"] == 1
    assert bool(engine.planner.stats.evictions) == (event == "preempt")


@pytest.mark.parametrize("event", ["abort", "preempt"])
@schedulers
def test_request_that_moves_on_when_it_is_due_is_not_compacted(
    make_engine: MakeEngine, asynchronous: bool, event: str
) -> None:
    engine = make_engine(asynchronous=asynchronous, granularity="token")
    assert engine.add("a", prompt_of(0, 5), 100, {})
    while not engine.planner._ready:
        engine.step()
    if event == "abort":
        engine.abort("a")
    else:
        engine.reset_prefix_cache(preempting=True)
    assert not engine.planner._ready
    engine.finish()
    assert engine.planner.stats.skipped["stale"] == 0
    assert bool(engine.planner.stats.evictions) == (event == "preempt")


@pytest.mark.parametrize("granularity", ["block", "token"])
def test_request_without_a_slot_waits_for_one(make_engine: MakeEngine, granularity: str) -> None:
    engine = make_engine(
        pool=14, min_budget=16, max_num_seqs=8, protect="none", chunk=8, granularity=granularity
    )
    # Three slots, and four requests that share what they hold.
    prompt = prompt_of(0, 21)
    for i in range(4):
        assert engine.add(f"r{i}", prompt, 40, {})
    engine.finish()
    assert engine.planner.stats.skipped["no_slot"] > 0


@pytest.mark.parametrize("granularity", ["block", "token"])
def test_statistics_reach_vllm(make_engine: MakeEngine, granularity: str) -> None:
    engine = make_engine(granularity=granularity)
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
    with pytest.raises(
        ConfigError, match="interval=8 take 6 blocks of 4 tokens, but the KV cache has 5"
    ):
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
