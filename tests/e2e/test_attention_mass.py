# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""H2O on vLLM's own engine: every query counts, in chunks, in company and after a preemption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .harness import BLOCK_SIZE, POLICY, InProcessEngine, in_process_engine, prompt, request

pytestmark = pytest.mark.e2e

NUM_BLOCKS = 80


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[InProcessEngine]:
    policy = {**POLICY, "policy": "h2o", "granularity": "token"}
    with in_process_engine(demo_model, num_blocks=NUM_BLOCKS, kv_policy=policy) as engine:
        yield engine


@pytest.fixture(autouse=True)
def fresh_cache(engine: InProcessEngine) -> None:
    engine.forget_cache()


def dense_mass(model_path: Path, tokens: list[int]) -> torch.Tensor:
    """[layers, kv_heads, tokens]: all that each token got from the queries of its group."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        attentions = torch.cat(model(torch.tensor([tokens]), output_attentions=True).attentions)
    return attentions.unflatten(1, (model.config.num_key_value_heads, -1)).sum((2, 3))


def accumulated(engine: InProcessEngine, request_id: str, tokens: int) -> torch.Tensor:
    (manager,) = engine.scheduler.evicting_managers
    ids = [block.block_id for block in manager.req_to_blocks[request_id]]
    planes = [layer.plane[ids] for layer in engine.worker.evictor.scorer.layers]
    return torch.stack(planes).transpose(1, 2).flatten(2)[..., :tokens]


def test_what_a_token_got_is_what_a_dense_forward_gives_it(
    engine: InProcessEngine, demo_model: Path
) -> None:
    # 300 tokens in chunks of at most 256; the second request finds blocks of the first cached.
    shared = prompt(5, 300)
    asked = [
        request(shared, 100, kv_protect="none"),
        request(shared + prompt(6, 30), 60, kv_protect="sinks"),
        request(prompt(7, 40), 80, kv_protect="prompt"),
    ]
    ids = [engine.add(one) for one in asked]
    protected = [0, BLOCK_SIZE, 2 * BLOCK_SIZE]
    seen: dict[str, tuple[list[int], torch.Tensor]] = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        running = {r.request_id: r for r in engine.scheduler.running}
        for id_ in ids:
            if id_ in running and len(running[id_].output_token_ids) >= 40:
                tokens = list(running[id_].all_token_ids)[: running[id_].num_computed_tokens]
                seen[id_] = tokens, accumulated(engine, id_, len(tokens))
        engine.step()
    assert set(seen) == set(ids)
    for id_, first in zip(ids, protected, strict=True):
        tokens, found = seen[id_]
        expected = dense_mass(demo_model, tokens)
        # Probabilities of two float32 forwards; a token's sum is at most its number of queries.
        torch.testing.assert_close(found[..., first:], expected[..., first:], rtol=1e-3, atol=1e-3)


def test_oversubscribed_requests_are_evicted_preempted_and_complete(
    engine: InProcessEngine,
) -> None:
    # 16 requests of 400 tokens want 208 blocks; the pool has 79.
    preempted = 0

    def look(output: Any) -> None:
        nonlocal preempted
        preempted += len(output.preempted_req_ids or ())

    requests = [request(prompt(i, 40 + i), 360, kv_budget=96) for i in range(12)]
    requests += [request(prompt(20 + i, 40), 300, kv_policy="none") for i in range(4)]
    before = engine.scheduler.planner.stats.evictions
    with engine.each_schedule(look):
        outputs = engine.run(requests)
    assert [len(o["token_ids"]) for o in outputs] == [360] * 12 + [300] * 4
    assert engine.scheduler.planner.stats.evictions - before > 50
    assert preempted > 0
    assert engine.pool.get_num_free_blocks() == NUM_BLOCKS - 1
