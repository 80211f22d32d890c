# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Every policy of this package on vLLM's own engine; gkv and h2o have files of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from gkv_vllm.policies import registry

from .harness import POLICY, in_process_engine, prompt, request

pytestmark = pytest.mark.e2e

NUM_BLOCKS = 68
OTHERS = [name for name in registry.built_in() if name not in ("gkv", "h2o")]


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        *((name, {}) for name in OTHERS),
        ("gkv", {"scope": "all", "policy_config": {"variant": "zipage"}}),
        ("gkv", {"scope": "layer", "policy_config": {"history": "mean", "combine_by": "rank"}}),
        ("rkv", {"granularity": "block", "policy_config": {"variant": "gkv"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_an_oversubscribed_engine_serves_all_and_repeats(
    demo_model: Path, policy: str, settings: dict[str, object]
) -> None:
    # 9 requests of 290 tokens want 90 blocks; the pool has 67.
    requests = [request(prompt(i, 40), 250, kv_budget=96, kv_protect="none") for i in range(8)]
    requests.append(request(prompt(8, 40), 250, kv_policy="none"))
    asked = {**POLICY, "policy": policy, **settings}
    with in_process_engine(demo_model, num_blocks=NUM_BLOCKS, kv_policy=asked) as engine:
        first = engine.run(requests)
        evictions = engine.scheduler.planner.stats.evictions
        engine.forget_cache()
        again = engine.run(requests)
        free = engine.pool.get_num_free_blocks()
    assert [len(output["token_ids"]) for output in first] == [250] * 9
    assert evictions >= 8 * 4
    assert [output["token_ids"] for output in again] == [output["token_ids"] for output in first]
    assert free == NUM_BLOCKS - 1
