# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Runs vLLM's CPU engine in the test process, where tests can look at its blocks and plans."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
BLOCK_SIZE = 32
RESULT = "result: "
ENGINE_ARGUMENTS: dict[str, Any] = {
    "max_model_len": 2048,
    "block_size": BLOCK_SIZE,
    "enforce_eager": True,
    "dtype": "float32",
    "max_num_batched_tokens": 256,
    "max_num_seqs": 64,
    "seed": 0,
}
POLICY = {"policy": "gkv", "budget": 1024, "min_budget": 96, "interval": 32, "window": 16}


def prompt(seed: int, length: int) -> list[int]:
    """A prompt of byte tokens; the same seed gives the same prefix at any length."""
    return [(seed * 37 + 11 * i + (i * i) // 3) % 200 + 5 for i in range(length)]


def request(
    token_ids: list[int], max_tokens: int, *, temperature: float = 0.0, **kv: Any
) -> dict[str, Any]:
    """A request as plain data, for the in-process engine and for the stock one."""
    params: dict[str, Any] = {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "logprobs": 0,
    }
    if temperature:
        params["seed"] = 17
    if kv:
        params["extra_args"] = kv
    return {"prompt_token_ids": token_ids, "params": params}


class InProcessEngine:
    """An `LLM` whose scheduler and worker live in this process.

    The caller sets ENGINE_ENVIRONMENT first, and takes it back for whoever comes after."""

    def __init__(
        self,
        model: Path,
        *,
        num_blocks: int,
        kv_policy: dict[str, Any] | None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        from vllm import LLM

        extra = {"additional_config": {"kv_policy": kv_policy}} if kv_policy else {}
        extra |= {**ENGINE_ARGUMENTS, **(arguments or {})}
        self.llm = LLM(str(model), num_gpu_blocks_override=num_blocks, **extra)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        # With several ranks the workers live in processes of their own.
        driver = getattr(self.core.model_executor, "driver_worker", None)
        self.worker = driver.worker if driver else None
        self.runner = self.worker.model_runner if driver else None
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self._count = 0

    def add(self, request: dict[str, Any]) -> str:
        """Queue a request; `step` runs it. Returns the id that the scheduler knows it by."""
        from vllm import SamplingParams

        self._count += 1
        before = set(self.scheduler.requests)
        self.llm.llm_engine.add_request(
            f"request-{self._count}",
            {"prompt_token_ids": list(request["prompt_token_ids"])},
            SamplingParams(**request["params"]),
        )
        (internal,) = set(self.scheduler.requests) - before
        return internal

    def step(self) -> list[Any]:
        """One engine step: the outputs of requests that made progress."""
        return self.llm.llm_engine.step()

    def run(
        self, requests: list[dict[str, Any]], after_step: Callable[[], None] | None = None
    ) -> list[dict[str, Any]]:
        """Run requests to their ends: token ids and log-probabilities in the order given."""
        order = [self.add(request).rsplit("-", 1)[0] for request in requests]
        done: dict[str, dict[str, Any]] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.step():
                if output.finished:
                    done[output.request_id] = completed(output)
            if after_step is not None:
                after_step()
        return [done[id_] for id_ in order]

    def forget_cache(self) -> None:
        """Empty the prefix cache, so that scenarios do not feed each other."""
        assert self.scheduler.reset_prefix_cache()

    def key_value_caches(self) -> list[Any]:
        """The paged cache tensors, one per layer: [blocks, kv_heads, block_size, 2 * head_dim]."""
        return [cache for cache in self.runner.kv_caches]

    def close(self) -> None:
        """Let another engine start in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.scheduler, self.worker, self.runner, self.pool
        cleanup_dist_env_and_memory()

    @contextmanager
    def each_eviction(self, look: Callable[[], None]) -> Iterator[None]:
        """Call `look()` after blocks were freed and before vLLM allocates, in every step."""
        original = self.scheduler._evict

        def evict() -> None:
            original()
            look()

        self.scheduler._evict = evict
        try:
            yield
        finally:
            del self.scheduler._evict

    @contextmanager
    def each_begin(self, look: Callable[[Any], None]) -> Iterator[None]:
        """Call `look(plan)` once the worker has carried a plan out, before the step's forward."""
        evictor = self.worker.evictor
        original = evictor.begin

        def begin(plan: Any, *rest: Any) -> None:
            original(plan, *rest)
            look(plan)

        evictor.begin = begin
        try:
            yield
        finally:
            del evictor.begin

    @contextmanager
    def each_compaction(self, look: Callable[[Any], None]) -> Iterator[None]:
        """Call `look(keep)` whenever survivors move: [layers, kv_heads or 1, tokens]."""
        scorer = self.worker.evictor.scorer
        original = scorer.ops

        class Seen:
            def __getattr__(self, name: str) -> Any:
                return getattr(original, name)

            def compact(self, source: Any, target: Any, places: Any, keep: Any) -> None:
                look(keep.clone())
                original.compact(source, target, places, keep)

        scorer.ops = Seen()
        try:
            yield
        finally:
            scorer.ops = original

    @contextmanager
    def each_schedule(self, look: Callable[[Any], None]) -> Iterator[None]:
        """Call `look(scheduler_output)` for every step that is scheduled inside the block."""
        original = self.scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            look(output)
            return output

        self.scheduler.schedule = schedule
        try:
            yield
        finally:
            del self.scheduler.schedule


@contextmanager
def in_process_engine(
    model: Path, *, num_blocks: int, kv_policy: dict[str, Any]
) -> Iterator[InProcessEngine]:
    """An engine in this process, in the environment that it needs; both end with the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINE_ENVIRONMENT.items():
            patch.setenv(name, value)
        engine = InProcessEngine(model, num_blocks=num_blocks, kv_policy=kv_policy)
        try:
            yield engine
        finally:
            engine.close()


def moves_tokens(engine: InProcessEngine) -> bool:
    """Whether this engine has token granularity."""
    return engine.scheduler.kv_policy.moves_tokens


def completed(output: Any) -> dict[str, Any]:
    """What tests compare of a finished request."""
    (answer,) = output.outputs
    chosen = [
        step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
    ]
    return {
        "token_ids": list(answer.token_ids),
        "logprobs": chosen,
        "finish_reason": answer.finish_reason,
    }


def run_elsewhere(
    model: Path,
    requests: list[dict[str, Any]],
    num_blocks: int,
    *,
    kv_policy: dict[str, Any] | None = None,
    plugin: bool = True,
    stock_first: bool = False,
    arguments: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The requests through an engine in a process of its own: `outputs`, `evictions`, `free`.

    `lost` are, per request in the order given, the blocks that each of its evictions dropped.
    Without `plugin` vLLM does not even load us. With `stock_first` an engine without a policy runs
    and ends in that process before."""
    job = {
        "model": str(model),
        "num_blocks": num_blocks,
        "requests": requests,
        "kv_policy": kv_policy,
        "stock_first": stock_first,
        "arguments": arguments,
    }
    result = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(job),
        env={
            **os.environ,
            **ENGINE_ENVIRONMENT,
            **({} if plugin else {"VLLM_PLUGINS": ""}),
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    # Workers of several ranks log to the same stream.
    (line,) = [x for x in result.stdout.splitlines() if x.startswith(RESULT)]
    return json.loads(line.removeprefix(RESULT))


def main() -> None:
    job = json.load(sys.stdin)
    if job["stock_first"]:
        stock = InProcessEngine(Path(job["model"]), num_blocks=job["num_blocks"], kv_policy=None)
        stock.run(job["requests"][:1])
        stock.close()
    engine = InProcessEngine(
        Path(job["model"]),
        num_blocks=job["num_blocks"],
        kv_policy=job["kv_policy"],
        arguments=job["arguments"],
    )
    lost: list[list[Any]] = [[] for _ in job["requests"]]

    def look(output: Any) -> None:
        plan = getattr(output, "gkv_plan", None)
        for id_, blocks in (plan.drops if plan else {}).items():
            lost[int(id_.split("-")[1]) - 1].append(blocks)

    with engine.each_schedule(look):
        outputs = engine.run(job["requests"])
    planner = getattr(engine.scheduler, "planner", None)
    result = {
        "outputs": outputs,
        "evictions": planner.stats.evictions if planner else None,
        "free": engine.pool.get_num_free_blocks(),
        "lost": lost,
    }
    print(f"\n{RESULT}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
