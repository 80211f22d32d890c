# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""One measurement in a process of its own: an offline `vllm.LLM` runs a batch of requests.

`run` starts the process and waits; `main` is what runs in it. It never imports gkv_vllm, so that
the stock side is stock; the plugin comes in through vLLM's entry point or not at all.

The engine core and the worker have processes of their own, as in a server. The front end in this
one only collects token ids. After every step it is told the state of the scheduler, which is where
the numbers come from: nothing samples the engine while it runs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SEED = 0
FIRST_BYTE, LAST_BYTE = 0, 255
"""Token ids of a prompt: the demo model has one token per byte, and special tokens above."""

COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "evictions": "gkv:evictions_total",
    "blocks_freed": "gkv:blocks_freed_total",
    "eviction_seconds": "gkv:eviction_seconds_sum",
}


@dataclass(frozen=True)
class Job:
    """What one process measures. `kv_policy` None: stock vLLM, no plugin loaded."""

    model: str
    blocks: int
    block_size: int
    max_model_len: int
    requests: int
    prompt_tokens: int
    tokens: int
    warmup_requests: int
    warmup_tokens: int
    kv_policy: dict[str, Any] | None = None
    enforce_eager: bool = True

    def engine_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": self.model,
            "num_gpu_blocks_override": self.blocks,
            "block_size": self.block_size,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.requests,
            "enforce_eager": self.enforce_eager,
            "seed": SEED,
            "disable_log_stats": False,
        }
        if self.kv_policy:
            arguments["additional_config"] = {"kv_policy": self.kv_policy}
        return arguments


@dataclass
class Step:
    """The scheduler's state after one step, as the front end heard of it."""

    seconds: float
    blocks: float
    running: int


@dataclass
class Result:
    """What the process measured."""

    seconds: float
    tokens: int
    steps: list[Step] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    """By process; unlike the wall time, it hardly depends on what else the machine does."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def peak_blocks(self) -> int:
        return round(max(step.blocks for step in self.steps))

    def median_step(self) -> float:
        """Seconds; what else the machine does in bursts hardly moves it."""
        pairs = zip(self.steps, self.steps[1:], strict=False)
        return statistics.median(after.seconds - step.seconds for step, after in pairs)

    def time_mean(self, what: str) -> float:
        """Mean over time of a field of `Step`."""
        total = 0.0
        for step, after in zip(self.steps, self.steps[1:], strict=False):
            total += getattr(step, what) * (after.seconds - step.seconds)
        return total / (self.steps[-1].seconds - self.steps[0].seconds)


class CellFailed(RuntimeError):
    """The process ended without a result; the message holds the end of what it printed."""


def run(job: Job, environment: dict[str, str], timeout: float = 1800.0) -> Result:
    """Measure in a new process, whose children end with it."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "result.json"), Path(folder, "log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, __file__, str(answer)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, "VLLM_PLUGINS": "gkv" if job.kv_policy else ""},
                start_new_session=True,
            )
        try:
            process.communicate(json.dumps(asdict(job)).encode(), timeout)
        except subprocess.TimeoutExpired:
            raise CellFailed(f"the measuring process took over {timeout:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode or not answer.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
            raise CellFailed(f"the measuring process ended with {process.returncode}:\n{tail}")
        raw = json.loads(answer.read_text())
        raw["steps"] = [Step(*step) for step in raw["steps"]]
        return Result(**raw)


# --- inside the process --------------------------------------------------------------------------


def recorder(steps: list[Step], usable_blocks: int) -> Any:
    """A stat logger, vLLM's own extension point, that notes every step."""
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase

    class Recorder(AggregateStatLoggerBase):
        def __init__(self) -> None:
            pass

        def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
            if scheduler_stats is not None:
                blocks = scheduler_stats.kv_cache_usage * usable_blocks
                running = scheduler_stats.num_running_reqs
                steps.append(Step(time.perf_counter(), blocks, running))

        def log_engine_initialized(self) -> None:
            pass

    return Recorder()


def read_counters() -> dict[str, float]:
    """The engine's Prometheus counters; 0 for those that it does not have."""
    from prometheus_client import REGISTRY

    values: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
    names = {metric: ours for ours, metric in COUNTERS.items()}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name in names:
                values[names[sample.name]] += sample.value
    return values


def cpu_seconds() -> dict[str, float]:
    """What this process and vLLM's have used so far: front end, EngineCore and Worker."""
    import psutil

    front_end = psutil.Process()
    used = {"front end": _cpu_seconds(front_end)}
    for process in front_end.children(recursive=True):
        # vLLM calls its processes VLLM::EngineCore and VLLM::Worker.
        title, found, name = process.cmdline()[0].partition("::")
        if found:
            used[name] = _cpu_seconds(process)
    return used


def _cpu_seconds(process: Any) -> float:
    times = process.cpu_times()
    return times.user + times.system


def generate(llm: Any, requests: int, prompt_tokens: int, tokens: int, seed: int) -> int:
    """Run requests with random prompts, greedily and to their full length; the tokens generated."""
    from vllm import SamplingParams

    draw = random.Random(seed)
    prompts = [
        {"prompt_token_ids": [draw.randint(FIRST_BYTE, LAST_BYTE) for _ in range(prompt_tokens)]}
        for _ in range(requests)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert generated == requests * tokens, f"{generated} tokens, not {requests} x {tokens}"
    return generated


def measure(job: Job) -> Result:
    from vllm import LLM

    llm = LLM(**job.engine_arguments())
    steps: list[Step] = []
    manager = llm.llm_engine.logger_manager
    assert manager is not None
    manager.stat_loggers.append(recorder(steps, job.blocks - 1))

    generate(llm, job.warmup_requests, job.prompt_tokens, job.warmup_tokens, SEED + 1)
    llm.reset_prefix_cache()
    steps.clear()

    counters, cpu, start = read_counters(), cpu_seconds(), time.perf_counter()
    tokens = generate(llm, job.requests, job.prompt_tokens, job.tokens, SEED)
    seconds = time.perf_counter() - start
    for step in steps:
        step.seconds -= start
    return Result(
        seconds, tokens, steps, grown(counters, read_counters()), grown(cpu, cpu_seconds())
    )


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in before}


def main() -> None:
    job = Job(**json.load(sys.stdin))
    result = measure(job)
    assert bool(job.kv_policy) == ("gkv_vllm" in sys.modules), "the wrong side was measured"
    raw = asdict(result)
    raw["steps"] = [list(step.values()) for step in raw["steps"]]
    Path(sys.argv[1]).write_text(json.dumps(raw))


if __name__ == "__main__":
    main()
