# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""`make bench-cpu`: stock vLLM against a policy on the CPU, same model, pool and requests.

Each measurement is a process of its own (`cell.py`). The order of the sides alternates between
rounds, and the tables show medians over the rounds. benchmarks/README.md says what they mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cell
import machine
from cell import CellFailed, Job, Result

from gkv_vllm.config import blocks_for
from gkv_vllm.engine.footprint import due_tokens, protected_blocks

STOCK = "stock"
NOT_DUE = "gkv:token, never due"
ENVIRONMENT = {
    # GiB for the KV cache; the pool's size is given in blocks and takes a tenth of it.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # vLLM's default: one core for the engine core, the worker's threads bound to the others.
    "VLLM_CPU_OMP_THREADS_BIND": "auto",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # As many as vLLM binds on two cores; in one process it would not bind them.
    "OMP_NUM_THREADS": "1",
}
SERIES_POINTS = 300


@dataclass(frozen=True)
class Settings:
    """What is measured, from the command line."""

    model: Path
    requests: int
    tokens: int
    prompt_tokens: int
    budget: int
    interval: int
    block_size: int
    pool: int
    ample_pool: int
    policies: tuple[str, ...]
    rounds: int
    eager: bool
    in_process: bool
    idle: bool

    @property
    def environment(self) -> dict[str, str]:
        return ENVIRONMENT | (IN_PROCESS if self.in_process else {})

    @property
    def max_model_len(self) -> int:
        return blocks_for(self.prompt_tokens + self.tokens, 128) * 128

    def job(self, blocks: int, side: str) -> Job:
        due = due_tokens(self.budget, self.interval, self.block_size)
        return Job(
            model=str(self.model),
            blocks=blocks,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            requests=self.requests,
            prompt_tokens=self.prompt_tokens,
            tokens=self.tokens,
            warmup_requests=min(4, self.requests),
            # Long enough to be evicted once, so that nothing is done for the first time later.
            warmup_tokens=min(self.tokens, due + self.block_size),
            kv_policy=self.kv_policy(side),
            enforce_eager=self.eager,
        )

    def kv_policy(self, side: str) -> dict[str, Any] | None:
        if side == STOCK:
            return None
        if side == NOT_DUE:
            settings = {"budget": self.max_model_len, "interval": self.interval}
            return {"policy": "gkv", "granularity": "token", **settings}
        parsed = Side.parse(side)
        settings = {"budget": self.budget, "interval": self.interval}
        return {**settings, **asdict(parsed)}

    def cases(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """Name of each case: blocks in the pool, and the sides."""
        if self.idle:
            return {"ample": (self.ample_pool, (STOCK, NOT_DUE))}
        return {
            "memory-bound": (self.pool, (STOCK, *self.policies)),
            "ample": (self.ample_pool, (STOCK, *self.policies, NOT_DUE)),
        }


@dataclass(frozen=True)
class Side:
    """`gkv:token/none` is gkv by token with protect=none; by default blocks and the prompt."""

    policy: str
    granularity: str
    protect: str

    @classmethod
    def parse(cls, text: str) -> Side:
        """`POLICY[:GRANULARITY][/PROTECT]`."""
        what, _, protect = text.partition("/")
        policy, _, granularity = what.partition(":")
        return cls(policy, granularity or "block", protect or "prompt")


Measurements = dict[tuple[str, str], list[Result]]
"""By case and side, one per round."""


def measure_all(settings: Settings, say: Callable[[str], None]) -> Measurements:
    measurements: Measurements = {}
    for round_ in range(settings.rounds):
        for case, (blocks, sides) in settings.cases().items():
            for side in sides if round_ % 2 == 0 else reversed(sides):
                result = cell.run(settings.job(blocks, side), settings.environment)
                measurements.setdefault((case, side), []).append(result)
                say(
                    f"round {round_ + 1}/{settings.rounds}  {case:<12}  {side:<20}  "
                    f"{result.tokens_per_second:7.0f} tok/s"
                )
    return measurements


# --- arithmetic: what memory allows --------------------------------------------------------------


def held_blocks(settings: Settings, side: str) -> Iterator[int]:
    """Blocks that one undisturbed request holds after each of its decode steps.

    The planner's rules (docs/design.md), without the steps that scores take to arrive."""
    size, holes = settings.block_size, 0
    protect = Side.parse(side).protect
    protected = protected_blocks(protect, settings.prompt_tokens, size)
    due = due_tokens(settings.budget, settings.interval, size)
    for n in range(settings.prompt_tokens + 1, settings.prompt_tokens + settings.tokens + 1):
        yield blocks_for(n, size) - holes
        if side != STOCK and n - (protected + holes) * size >= due:
            holes = blocks_for(n, size) - protected - blocks_for(settings.budget, size)


def concurrency(settings: Settings) -> dict[str, Any]:
    """How many requests fit into the small pool, by the peak and by the mean of what they hold."""
    usable = settings.pool - 1
    answer: dict[str, Any] = {}
    for side in (STOCK, *settings.policies):
        held = list(held_blocks(settings, side))
        mean = statistics.fmean(held)
        answer[side] = {
            "peak_blocks": max(held),
            "mean_blocks": round(mean, 2),
            "fit_by_peak": round(usable / max(held), 2),
            "fit_by_mean": round(min(settings.requests, usable / mean), 2),
        }
    for bound in answer.values():
        for key in ("peak", "mean"):
            fit = min(settings.requests, bound[f"fit_by_{key}"])
            bound[f"ratio_by_{key}"] = round(fit / answer[STOCK][f"fit_by_{key}"], 2)
    return answer


# --- the numbers ---------------------------------------------------------------------------------


def summarise(results: list[Result], stock: list[Result]) -> dict[str, Any]:
    def median(of: Callable[[Result], float], digits: int = 1) -> float:
        return round(statistics.median(map(of, results)), digits)

    ratios = [
        mine.tokens_per_second / theirs.tokens_per_second
        for mine, theirs in zip(results, stock, strict=True)
    ]
    evictions = sum(result.counters["evictions"] for result in results)
    seconds = sum(result.counters["eviction_seconds"] for result in results)
    return {
        "tokens_per_second": median(lambda r: r.tokens_per_second),
        "ratio_to_stock": round(statistics.median(ratios), 3),
        "ratio_per_round": [round(ratio, 3) for ratio in ratios],
        "seconds": median(lambda r: r.seconds, 2),
        "steps": median(lambda r: len(r.steps), 0),
        "ms_per_step": median(lambda r: 1000 * r.seconds / len(r.steps), 2),
        "ms_per_step_median": median(lambda r: 1000 * r.median_step(), 2),
        "requests_running_mean": median(lambda r: r.time_mean("running")),
        "blocks_peak": median(lambda r: r.peak_blocks, 0),
        "blocks_mean": median(lambda r: r.time_mean("blocks")),
        "preemptions": median(lambda r: r.counters["preemptions"], 0),
        "evictions": median(lambda r: r.counters["evictions"], 0),
        "blocks_freed": median(lambda r: r.counters["blocks_freed"], 0),
        "cpu_seconds": {
            process: median(lambda r, name=process: r.cpu_seconds[name])  # type: ignore[misc]
            for process in results[0].cpu_seconds
        },
        "ms_per_eviction": round(1000 * seconds / evictions, 3) if evictions else None,
    }


def series(result: Result) -> dict[str, list[float]]:
    """Blocks and running requests over time, thinned for the plot."""
    stride = max(1, len(result.steps) // SERIES_POINTS)
    kept = [*result.steps[::stride], result.steps[-1]]
    return {
        "seconds": [round(step.seconds, 3) for step in kept],
        "blocks": [round(step.blocks) for step in kept],
        "running": [step.running for step in kept],
    }


def document(settings: Settings, measured: Measurements, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything that bench.json holds."""
    cases = {
        name: {
            "pool_blocks": blocks,
            "sides": {
                side: {
                    **summarise(measured[name, side], measured[name, STOCK]),
                    "series_of_first_round": series(measured[name, side][0]),
                }
                for side in sides
            },
        }
        for name, (blocks, sides) in settings.cases().items()
    }
    asked = {**asdict(settings), "max_model_len": settings.max_model_len}
    asked["model"] = settings.model.name
    asked["environment"] = settings.environment
    return {
        "machine": facts,
        "settings": asked,
        "concurrency_bound": concurrency(settings),
        "cases": cases,
    }


# --- what is printed -----------------------------------------------------------------------------

COLUMNS = {
    "tokens_per_second": "tok/s",
    "ratio_to_stock": "ratio",
    "ms_per_step": "ms/step",
    "requests_running_mean": "running",
    "preemptions": "preempt",
    "blocks_peak": "blocks peak",
    "blocks_mean": "mean",
    "evictions": "evict",
    "ms_per_eviction": "ms each",
}


def show(numbers: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = numbers["settings"]
    console = Console(width=110)
    for name, case in numbers["cases"].items():
        table = Table(
            title=f"{name}: {settings['requests']} requests x {settings['tokens']} tokens, "
            f"{case['pool_blocks']} blocks of {settings['block_size']} tokens"
        )
        table.add_column("")
        for heading in COLUMNS.values():
            table.add_column(heading, justify="right")
        for side, cells in case["sides"].items():
            table.add_row(side, *(formatted(cells[key]) for key in COLUMNS))
        console.print(table)
    for sentence in sentences(numbers):
        console.print(sentence, highlight=False)


def formatted(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"


def sentences(numbers: dict[str, Any]) -> list[str]:
    """The bounds, and how far each policy is from them."""
    ample = numbers["cases"]["ample"]["sides"]
    idle = ample[NOT_DUE]
    return [
        *(line for policy in numbers["settings"]["policies"] for line in bounds(numbers, policy)),
        *granularities(numbers),
        f"Step overhead when nothing is due: {idle['ratio_to_stock']:.3f} of the speed of stock "
        f"(rounds: {', '.join(f'{ratio:.3f}' for ratio in idle['ratio_per_round'])}); the median "
        f"step takes {idle['ms_per_step_median']} ms, {ample[STOCK]['ms_per_step_median']} ms in "
        "stock.",
    ]


def granularities(numbers: dict[str, Any]) -> list[str]:
    """What moving tokens costs in throughput, for policies measured both ways."""
    sides = numbers["settings"]["policies"]
    lines = []
    for side in sides:
        block = side.replace(":token", ":block")
        if side == block or block not in sides:
            continue
        ratios = []
        for name, case in numbers["cases"].items():
            of = {one: case["sides"][one]["tokens_per_second"] for one in (side, block)}
            ratios.append(f"{of[side] / of[block]:.3f} ({name})")
        lines.append(f"{side} makes of the throughput of {block}: {', '.join(ratios)}.")
    return lines


def bounds(numbers: dict[str, Any], policy: str) -> list[str]:
    small, ample = (numbers["cases"][name]["sides"] for name in ("memory-bound", "ample"))
    stock, mine = numbers["concurrency_bound"][STOCK], numbers["concurrency_bound"][policy]
    running = {side: small[side]["requests_running_mean"] for side in (STOCK, policy)}
    roof = ample[policy]["tokens_per_second"]
    return [
        f"{policy}, concurrency bound: a request holds at most {mine['peak_blocks']} blocks, "
        f"{stock['peak_blocks']} in stock, so {mine['fit_by_peak']} and {stock['fit_by_peak']} "
        f"fit for sure: {mine['ratio_by_peak']}x. On average over its life it holds "
        f"{mine['mean_blocks']} and {stock['mean_blocks']}: {mine['ratio_by_mean']}x. Measured: "
        f"{running[policy]} and {running[STOCK]} ran together, "
        f"{running[policy] / running[STOCK]:.2f}x.",
        f"{policy}, speed bound: with blocks for everyone it makes {roof:,.0f} tok/s; memory-bound "
        f"it reaches {100 * small[policy]['tokens_per_second'] / roof:.0f} % of that, stock "
        f"{100 * small[STOCK]['tokens_per_second'] / roof:.0f} %.",
    ]


# --- the command ---------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> tuple[Settings, Path]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=machine.ROOT / "build" / "demo-model")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1500, help="per request")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--interval", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--pool", type=int, default=320, help="blocks, memory-bound case")
    parser.add_argument("--ample-pool", type=int, default=2400, help="blocks, ample case")
    parser.add_argument(
        "--policies",
        default="gkv:block,gkv:token,gkv:token/none,rkv:token,random:token",
        help="comma-separated POLICY[:GRANULARITY][/PROTECT]; default block and prompt",
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--compile", dest="eager", action="store_false", help="torch.compile, on both sides"
    )
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="engine core and worker in the process of the front end, on both sides",
    )
    parser.add_argument(
        "--idle",
        action="store_true",
        help="only what the plugin costs when nothing is due; writes idle.json",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: few tokens, one round")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks/results/cpu")
    arguments = vars(parser.parse_args(argv))
    arguments["policies"] = () if arguments["idle"] else tuple(arguments["policies"].split(","))
    out, quick = arguments.pop("out"), arguments.pop("quick")
    if quick:
        arguments |= {"requests": 8, "tokens": 400, "pool": 64, "ample_pool": 160, "budget": 96}
        arguments |= {"interval": 32, "rounds": 1}
    if not (arguments["model"] / "config.json").exists():
        parser.error(f"no model at {arguments['model']}; `make bench-cpu` makes it")
    return Settings(**arguments), out


def main(argv: list[str] | None = None) -> int:
    from kv_use_plot import draw

    settings, out = parse_args(argv)
    facts = machine.describe()
    if facts["load_at_start"] > 0.5:
        print(f"The machine is busy (load {facts['load_at_start']}); expect noise.", flush=True)
    try:
        measured = measure_all(settings, lambda line: print(line, flush=True))
    except CellFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        return 130
    numbers = document(settings, measured, facts)
    show(numbers)
    out.mkdir(parents=True, exist_ok=True)
    if settings.idle:
        (out / "idle.json").write_text(json.dumps(numbers, indent=1) + "\n")
        print(f"Wrote idle.json to {out}")
        return 0
    (out / "bench.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(numbers, out / "kv_use.png")
    print(f"Wrote bench.json and kv_use.png to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
