# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Layer groups on vLLM's own engine: each group has a KV cache group, a block table and kept blocks
of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .dense import dense_log_probabilities, run_and_follow
from .harness import POLICY, InProcessEngine, in_process_engine, prompt, request, run_elsewhere

pytestmark = pytest.mark.e2e

NUM_BLOCKS = 300
SMALL = {"kv_budget": 96}


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[InProcessEngine]:
    policy = {**POLICY, "granularity": "block", "layer_groups": 2, "layer_split": "interleaved"}
    with in_process_engine(demo_model, num_blocks=NUM_BLOCKS, kv_policy=policy) as engine:
        yield engine


@pytest.fixture(autouse=True)
def fresh_cache(engine: InProcessEngine) -> None:
    engine.forget_cache()


def test_each_group_has_its_own_layers_and_manager(engine: InProcessEngine) -> None:
    groups = engine.scheduler.kv_cache_config.kv_cache_groups
    layers = [[int(name.split(".")[2]) for name in group.layer_names] for group in groups]
    assert layers == [[0, 2], [1, 3]]
    assert [manager.layer_group for manager in engine.scheduler.evicting_managers] == [0, 1]


def test_nothing_evicted_gives_the_very_bits_of_stock_vllm(
    engine: InProcessEngine, demo_model: Path
) -> None:
    shared = prompt(3, 150)
    batch = [request(shared + prompt(i, 40), 50) for i in range(4)]
    stock = run_elsewhere(demo_model, batch, NUM_BLOCKS, plugin=False)
    assert engine.run(batch) == stock["outputs"]
    # Once more on a warm prefix cache, of which each group has its part.
    hits: list[int] = []

    def look(output: Any) -> None:
        hits.extend(new.num_computed_tokens for new in output.scheduled_new_reqs)

    with engine.each_schedule(look):
        again = engine.run(batch)
    assert min(hits) > 100
    assert [o["token_ids"] for o in again] == [o["token_ids"] for o in stock["outputs"]]


def test_log_probabilities_equal_a_dense_model_in_which_groups_see_different_tokens(
    engine: InProcessEngine, demo_model: Path
) -> None:
    asked = request(prompt(90, 45), 420, kv_budget=192)
    answer, survivors = run_and_follow(engine, asked)
    assert len(survivors.gone) > 5
    differ = sum(not torch.equal(held[0], held[1]) for _, held in survivors.gone)
    assert differ > 0, "the groups never chose differently"
    assert all(torch.equal(held[0], held[2]) for _, held in survivors.gone)
    length = len(asked["prompt_token_ids"]) + 420
    expected = dense_log_probabilities(
        demo_model, asked["prompt_token_ids"], answer["token_ids"], survivors.visible(length)
    )
    torch.testing.assert_close(torch.tensor(answer["logprobs"]), expected, rtol=1e-3, atol=2e-3)


def test_oversubscribed_groups_lose_equally_many_blocks_and_give_all_back(
    engine: InProcessEngine,
) -> None:
    # 24 requests of 560 tokens want 864 blocks in two groups; the pool has 299.
    requests = [request(prompt(i, 40 + i), 500, **SMALL) for i in range(24)]
    managers = engine.scheduler.evicting_managers

    def look() -> None:
        holders: Counter[int] = Counter()
        for manager in managers:
            for blocks in manager.req_to_blocks.values():
                holders.update(block.block_id for block in blocks if not block.is_null)
        for id_ in managers[0].req_to_blocks:
            holes = [sum(b.is_null for b in manager.req_to_blocks[id_]) for manager in managers]
            assert holes[0] == holes[1]
        assert engine.pool.get_num_free_blocks() + len(holders) == NUM_BLOCKS - 1

    outputs = engine.run(requests, after_step=look)
    assert [len(o["token_ids"]) for o in outputs] == [500] * 24
    assert engine.scheduler.planner.stats.evictions > 100
    assert engine.pool.get_num_free_blocks() == NUM_BLOCKS - 1
