# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Two tensor-parallel ranks (gloo, CPU) keep what one rank keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .harness import POLICY, prompt, request, run_elsewhere

pytestmark = pytest.mark.e2e

NUM_BLOCKS = 120
FORMS: dict[str, dict[str, Any]] = {
    "block": {"granularity": "block"},
    "token, for all heads": {"granularity": "token", "scope": "all"},
    "random, token, each head": {"granularity": "token", "scope": "head", "policy": "random"},
}


def run(model: Path, ranks: int, form: dict[str, Any]) -> dict[str, Any]:
    requests = [request(prompt(i, 40 + 31 * i), 200, kv_budget=96) for i in range(3)]
    return run_elsewhere(
        model,
        requests,
        NUM_BLOCKS,
        kv_policy={**POLICY, **form},
        arguments={"tensor_parallel_size": ranks},
        # Each rank binds to cores of its own, which a small machine does not have.
        environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_two_ranks_keep_what_one_keeps(demo_model: Path, form: dict[str, Any]) -> None:
    one, two = (run(demo_model, ranks, form) for ranks in (1, 2))
    assert one["evictions"] == two["evictions"] > 0
    assert one["lost"] == two["lost"]
    assert any(one["lost"])
    assert two["free"] == NUM_BLOCKS - 1
    for ours, theirs in zip(one["outputs"], two["outputs"], strict=True):
        assert ours["token_ids"] == theirs["token_ids"]
        # In float32, after some 200 steps over the same kept sets.
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-3)
