# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The invariants of eviction on vLLM's own engine (CPU build), seen from inside its process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gkv_vllm.engine.footprint import peak_blocks

from .dense import dense_log_probabilities, run_and_follow
from .harness import (
    BLOCK_SIZE,
    POLICY,
    InProcessEngine,
    in_process_engine,
    moves_tokens,
    prompt,
    request,
    run_elsewhere,
)

pytestmark = pytest.mark.e2e

NUM_BLOCKS = 260
SMALL = {"kv_budget": 96}


@pytest.fixture(scope="module", params=["block", "token"])
def engine(demo_model: Path, request: pytest.FixtureRequest) -> Iterator[InProcessEngine]:
    policy = {**POLICY, "granularity": request.param}
    with in_process_engine(demo_model, num_blocks=NUM_BLOCKS, kv_policy=policy) as engine:
        yield engine


@pytest.fixture(autouse=True)
def fresh_cache(engine: InProcessEngine) -> None:
    engine.forget_cache()


def held(engine: InProcessEngine) -> Counter[int]:
    """Block id to the number of tables that hold it, over all requests."""
    (manager,) = engine.scheduler.evicting_managers
    return Counter(
        block.block_id
        for blocks in manager.req_to_blocks.values()
        for block in blocks
        if not block.is_null
    )


def assert_accounts_balance(engine: InProcessEngine) -> None:
    """Every block is free or held, and its reference count says by how many."""
    holders = held(engine)
    for block in engine.pool.blocks:
        if not block.is_null:
            assert block.ref_cnt == holders[block.block_id]
    assert engine.pool.get_num_free_blocks() + len(holders) == NUM_BLOCKS - 1


def mixed_batch() -> list[dict[str, Any]]:
    """Chunks, shared prefixes, sampling; the second half meets a warm prefix cache."""
    shared = prompt(3, 150)
    # First, so that its prompt is not split: a seeded request in chunks kills stock vLLM on CPU.
    sampled = request(prompt(9, 60), 40, temperature=0.8)
    batch = [request(prompt(i, 20 + 31 * i), 60) for i in range(5)]
    batch += [request(shared + prompt(i, 40), 50) for i in range(20, 24)]
    return [sampled, *batch, *batch]


@pytest.fixture(scope="module")
def stock(demo_model: Path) -> dict[str, Any]:
    return run_elsewhere(demo_model, mixed_batch(), NUM_BLOCKS, plugin=False)


def test_nothing_evicted_gives_the_very_bits_of_stock_vllm(
    engine: InProcessEngine, stock: dict[str, Any]
) -> None:
    events = engine.scheduler.planner.stats.evictions
    ours = engine.run(mixed_batch())
    assert engine.scheduler.planner.stats.evictions == events
    assert stock["evictions"] is None
    assert ours == stock["outputs"]


def test_a_request_never_holds_more_than_its_bound_and_accounts_balance(
    engine: InProcessEngine,
) -> None:
    requests = [request(prompt(i, 30 + 7 * i), 400, **SMALL) for i in range(6)]
    requests += [request(prompt(50, 500), 200, kv_budget=128, kv_protect="none")]
    requests += [request(prompt(51, 500), 200, kv_budget=128, kv_protect="sinks")]
    (manager,) = engine.scheduler.evicting_managers
    most: Counter[str] = Counter()

    def look() -> None:
        assert_accounts_balance(engine)
        for id_, blocks in manager.req_to_blocks.items():
            live = sum(not block.is_null for block in blocks)
            most[id_] = max(most[id_], live)
            asked = engine.scheduler.requests[id_]
            policy = engine.scheduler.kv_policy.for_request(
                asked.sampling_params.extra_args, BLOCK_SIZE
            )
            assert live <= peak_blocks(
                policy,
                prompt_tokens=asked.num_prompt_tokens,
                max_tokens=2048,
                block_size=BLOCK_SIZE,
                interval=POLICY["interval"],
                in_flight_tokens=min(256, asked.num_prompt_tokens),
            )

    outputs = engine.run(requests, after_step=look)
    assert [len(o["token_ids"]) for o in outputs] == [400] * 6 + [200] * 2
    # The bound is not just an upper one: without eviction a small request would hold 14 blocks.
    assert sorted(most.values())[:6] <= [8] * 6
    assert engine.pool.get_num_free_blocks() == NUM_BLOCKS - 1


def test_freed_blocks_are_never_read(engine: InProcessEngine) -> None:
    """What left a table is NaN as soon as the survivors have moved, before the forward.

    A block that somebody got in the same schedule is made large instead: stock vLLM hands out
    blocks as they are, and its kernels multiply the unwritten rest of a last one by zero."""
    requests = [request(prompt(i, 40 + 9 * i), 300, **SMALL) for i in range(6)]
    clean = engine.run(requests)
    engine.forget_cache()
    caches = engine.key_value_caches()
    free: set[int] = set()
    reused, poisoned = 0, 0

    def fill(ids: set[int], value: float) -> None:
        for cache in caches:
            cache[sorted(ids)] = value

    def unhashed_free() -> set[int]:
        blocks = engine.pool.blocks[1:]
        return {b.block_id for b in blocks if b.ref_cnt == 0 and b.block_hash is None}

    def freed() -> None:
        free.update(unhashed_free())

    def moved(plan: Any) -> None:
        nonlocal reused, poisoned
        renewed = {
            block_id
            for order in (plan.compact if plan else {}).values()
            for ids in order.fresh.values()
            for block_id in ids.values()
        }
        handed_out = free - unhashed_free() - renewed
        fill(handed_out, 1e4)
        reused += len(handed_out)
        fresh_poison = unhashed_free() if plan and plan.drops else set()
        fill(fresh_poison, float("nan"))
        poisoned += len(fresh_poison)
        free.clear()
        free.update(unhashed_free())

    try:
        fill(unhashed_free(), float("nan"))
        free.update(unhashed_free())
        with engine.each_eviction(freed), engine.each_begin(moved):
            dirty = engine.run(requests)
        assert reused > 50
        assert poisoned > 50
        assert dirty == clean
    finally:
        for cache in caches:
            cache.nan_to_num_(0.0)


def test_shared_prefix_bytes_survive_eviction_and_others_hit_them(engine: InProcessEngine) -> None:
    shared = prompt(7, 8 * BLOCK_SIZE)
    alone = engine.run([request(shared + prompt(70, 9), 30)])
    engine.forget_cache()

    engine.run([request(shared + prompt(71, 5), 1)])
    hashed = [b.block_id for b in engine.pool.blocks if b.block_hash is not None]
    before = [cache[hashed].clone() for cache in engine.key_value_caches()]
    evicting = request(shared + prompt(72, 3), 300, kv_budget=96, kv_protect="none")
    neighbour = request(shared + prompt(70, 9), 30)
    dropped: Counter[int] = Counter()

    def look(output: Any) -> None:
        plan = getattr(output, "gkv_plan", None)
        for (blocks,) in (plan.drops if plan else {}).values():
            dropped.update(blocks)

    with engine.each_schedule(look):
        _, beside = engine.run([evicting, neighbour])
    assert any(block < 8 for block in dropped), "no shared block was evicted"
    for cache, bytes_before in zip(engine.key_value_caches(), before, strict=True):
        assert torch.equal(cache[hashed], bytes_before)
    assert beside["token_ids"] == alone[0]["token_ids"]
    again = engine.run([request(shared + prompt(70, 9), 30)])
    assert again[0]["token_ids"] == alone[0]["token_ids"]


def test_blocks_computed_after_an_eviction_never_enter_the_prefix_cache(
    engine: InProcessEngine,
) -> None:
    first = request(prompt(80, 40), 400, **SMALL)
    (answer,) = engine.run([first])
    follow_up = first["prompt_token_ids"] + answer["token_ids"]
    hits: list[int] = []

    def look(output: Any) -> None:
        hits.extend(new.num_computed_tokens for new in output.scheduled_new_reqs)

    with engine.each_schedule(look):
        engine.run([request(follow_up, 1, kv_policy="none")])
    # Two blocks of prompt, the budget and the interval: then the first block left. Survivors
    # that move take the first block of the region away from the cache, and all behind it.
    exact = 0 if moves_tokens(engine) else 96 + 32
    assert hits == [2 * BLOCK_SIZE + exact]


def test_four_times_more_demand_than_blocks_ends_well(engine: InProcessEngine) -> None:
    # 40 requests of 700 tokens want 880 blocks; the pool has 259.
    requests = [request(prompt(i, 40 + i), 660, **SMALL) for i in range(30)]
    requests += [request(prompt(60 + i, 64), 300, kv_policy="none") for i in range(10)]
    aborted: list[str] = []

    def abort_some() -> None:
        if len(aborted) < 4 and len(engine.scheduler.running) > 20:
            victim = engine.scheduler.running[len(aborted) * 3].request_id
            aborted.append(victim.rsplit("-", 1)[0])
            engine.llm.llm_engine.abort_request([victim], internal=True)

    order = [engine.add(r).rsplit("-", 1)[0] for r in requests]
    lengths: dict[str, int] = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                lengths[output.request_id] = len(output.outputs[0].token_ids)
        abort_some()
        assert_accounts_balance(engine)
    assert len(aborted) == 4
    for id_, asked in zip(order, requests, strict=True):
        if id_ not in aborted:
            assert lengths[id_] == asked["params"]["max_tokens"]
    assert engine.pool.get_num_free_blocks() == NUM_BLOCKS - 1
    assert not engine.scheduler.planner.tracks


def test_log_probabilities_equal_a_dense_model_over_the_surviving_tokens(
    engine: InProcessEngine, demo_model: Path
) -> None:
    """The whole chain at once, against a forward that knows nothing of blocks."""
    asked = request(prompt(90, 45), 420, **SMALL)
    answer, survivors = run_and_follow(engine, asked)
    assert len(survivors.gone) > 5
    length = len(asked["prompt_token_ids"]) + 420
    expected = dense_log_probabilities(
        demo_model, asked["prompt_token_ids"], answer["token_ids"], survivors.visible(length)
    )
    # float32 through four layers: the two forwards differ by rounding only.
    torch.testing.assert_close(torch.tensor(answer["logprobs"]), expected, rtol=1e-3, atol=2e-3)


def test_the_same_request_repeats_whatever_else_is_in_the_batch(engine: InProcessEngine) -> None:
    asked = request(prompt(33, 50), 250, **SMALL)
    alone = engine.run([asked])[0]
    engine.forget_cache()
    crowd = [request(prompt(100 + i, 30 + i), 200, **SMALL) for i in range(5)]
    together = engine.run([*crowd, asked])[-1]
    assert json.dumps(together["token_ids"]) == json.dumps(alone["token_ids"])


def test_the_same_request_repeats_however_fragmented_the_pool_is(engine: InProcessEngine) -> None:
    asked = request(prompt(34, 50), 250, **SMALL)
    alone = engine.run([asked])[0]
    # Requests of many lengths end at different times: the free queue is no longer in order.
    engine.run([request(prompt(200 + i, 20 + 17 * i), 30 + 23 * i) for i in range(7)])
    engine.forget_cache()
    tables: list[list[int]] = []

    def look(output: Any) -> None:
        (manager,) = engine.scheduler.evicting_managers
        for blocks in manager.req_to_blocks.values():
            tables.append([block.block_id for block in blocks if not block.is_null])

    with engine.each_schedule(look):
        again = engine.run([asked])[0]
    longest = max(tables, key=len)
    assert any(b - a != 1 for a, b in zip(longest, longest[1:], strict=False)), "not fragmented"
    assert again == alone


def test_fresh_blocks_stand_in_for_shared_ones_and_nobody_notices(
    engine: InProcessEngine,
) -> None:
    """Two requests over one unprotected prefix: both evict while the other still reads it."""
    shared = prompt(8, 6 * BLOCK_SIZE)
    asked = [
        request(shared + prompt(130 + i, 9 + i), 200, kv_budget=160, kv_protect="none")
        for i in range(2)
    ]
    alone = []
    for one in asked:
        alone += engine.run([one])
        engine.forget_cache()
    fresh = 0

    def look(plan: Any) -> None:
        nonlocal fresh
        for order in (plan.compact if plan else {}).values():
            fresh += sum(map(len, order.fresh.values()))

    # The first one caches the prefix; then both hold it.
    engine.run([request(shared + prompt(140, 3), 1)])
    with engine.each_begin(look):
        together = engine.run(asked)
    assert (fresh > 0) == moves_tokens(engine)
    assert [o["token_ids"] for o in together] == [o["token_ids"] for o in alone]
