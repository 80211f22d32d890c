# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Prompts through vLLM's own engine under a policy, evicted once before they are answered.

`python -m gkv_vllm.eval.crosscheck.engine JOB OUT`: an engine lives in a process of its own, and
its scheduler and worker in that process, where what they keep can be noted."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
INTERVAL = 64
"""More than the tokens generated, so that a prompt is evicted once."""
LONGEST = 2048


def start(model: str, policy: str, settings: dict[str, Any], window: int, budget: int) -> Any:
    """An engine that takes each prompt in one step, and caches no prefix."""
    from vllm import LLM

    from gkv_vllm.eval.crosscheck.paged import BLOCK_SIZE

    kv_policy = {
        "policy": policy,
        "policy_config": settings,
        "budget": budget,
        "window": window,
        "interval": INTERVAL,
        "granularity": "token",
        "scope": "head",
        "protect": "none",
    }
    return LLM(
        model,
        dtype="float32",
        block_size=BLOCK_SIZE,
        max_model_len=LONGEST,
        max_num_batched_tokens=LONGEST,
        enable_prefix_caching=False,
        enforce_eager=True,
        additional_config={"kv_policy": kv_policy},
        disable_log_stats=True,
    )


def answer(llm: Any, ids: list[int], count: int, **kv: Any) -> dict[str, Any]:
    """Greedy tokens after one prompt, with the log-probability of each."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, logprobs=0, extra_args=kv
    )
    (output,) = llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)
    (written,) = output.outputs
    tokens = list(written.token_ids)
    of_token = zip(written.logprobs, tokens, strict=True)
    return {"tokens": tokens, "logprobs": [step[token].logprob for step, token in of_token]}


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Per case the positions that stayed, the scores of candidates, and how the prompt goes on."""
    from gkv_vllm.eval.crosscheck.paged import Eviction, KeepWatch, positions

    budgets = [case["budget"] for case in job["cases"] if case["budget"]]
    llm = start(job["model"], job["policy"], job["settings"], job["window"], max(budgets))
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    watch = KeepWatch(worker.evictor.scorer)
    found = []
    for case in job["cases"]:
        ids = job["prompts"][case["prompt"]]
        asked = {"kv_budget": case["budget"]} if case["budget"] else {"kv_policy": "none"}
        watch.kept.clear()
        watch.scores.clear()
        result: dict[str, Any] = {"goes_on": answer(llm, ids, job["count"], **asked)}
        if len(watch.kept) != bool(case["budget"]):
            raise RuntimeError(f"{len(watch.kept)} evictions for {case}")
        if case["budget"]:
            eviction = Eviction(len(ids), job["window"], case["budget"])
            result["kept"] = positions(watch.kept[0], eviction)
            result["scores"] = watch.scores[0]
            result["operators"] = worker.evictor.scorer.ops.name
        found.append(result)
    return found


def main() -> None:
    os.environ.update(ENVIRONMENT)  # before vLLM is imported
    import torch

    with open(sys.argv[1]) as file:
        torch.save(run(json.load(file)), sys.argv[2])


if __name__ == "__main__":
    main()
