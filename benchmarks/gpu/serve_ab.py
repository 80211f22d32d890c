# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Stock `vllm serve` against the policy: same GPU memory, long outputs, rising concurrency.

    python benchmarks/gpu/serve_ab.py --budget-minutes 12
    python benchmarks/gpu/serve_ab.py --quick --device cpu

A model of Qwen3-8B's shape with dummy weights. Each level sends so many requests at once. Levels
whose requests fit the cache at full length are `ample`, the others `memory-bound`."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder's kernels.py would hide the package of that name
    sys.path[0] = str(Path(__file__).parents[1])

import machine
from gpu import client, common

from gkv_vllm.serving import HOST, Metrics, Server, ServerFailed, serve

STOCK, POLICY = "stock", "policy"
SIDES = (STOCK, POLICY)
DEMO_MODEL = machine.ROOT / "build" / "demo-model"
DEMO_CONFIG = machine.ROOT / "configs" / "serve" / "demo.yaml"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PROMPT_IDS = 256
"""The demo tokenizer's bytes; its special tokens lie above."""
GENERATED = "vllm:generation_tokens_total"
SAMPLE_SECONDS = 0.5
START_SECONDS = 600.0
"""A first start compiles and captures graphs."""
EXPECTED_START = 90.0
SETTLE_SECONDS = 30.0
WARM_SECONDS = 10.0


@dataclass(frozen=True)
class Settings:
    """What is measured. Flags are those of `vllm serve`, without dashes."""

    model: Path
    flags: dict[str, Any]
    """Of both sides."""
    policy: dict[str, Any]
    """Of the policy's side, on top."""
    levels: tuple[int, ...]
    prompt_tokens: int
    tokens: int
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def full_length(self) -> int:
        return self.prompt_tokens + self.tokens

    def arguments(self, side: str) -> list[str]:
        flags = self.flags | (self.policy if side == POLICY else {})
        words = []
        for name, value in flags.items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return words

    def environment_of(self, side: str) -> dict[str, str]:
        """Stock loads no plugin at all."""
        return self.environment | {"VLLM_PLUGINS": "gkv" if side == POLICY else ""}


# --- the model -----------------------------------------------------------------------------------


def config_of(model: common.Model, positions: int) -> dict[str, Any]:
    """A config.json of this shape, for any release of transformers that knows Qwen3."""
    theta = 1_000_000.0
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "dtype": "bfloat16",
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "initializer_range": 0.02,
        "intermediate_size": model.intermediate,
        "max_position_embeddings": positions,
        "num_attention_heads": model.query_heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": model.vocabulary,
    }


def make_model(folder: Path, model: common.Model, positions: int = 40960) -> Path:
    """A model without weights, with the demo model's tokenizer: for `--load-format dummy`."""
    if not (DEMO_MODEL / "config.json").exists():
        script = machine.ROOT / "scripts" / "make_demo_model.py"
        subprocess.run([sys.executable, str(script), str(DEMO_MODEL)], check=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(model, positions), indent=1) + "\n")
    for name in TOKENIZER:
        if (DEMO_MODEL / name).exists():
            shutil.copy(DEMO_MODEL / name, folder / name)
    return folder


# --- one side ------------------------------------------------------------------------------------


@dataclass
class Sample:
    """The server at one moment."""

    seconds: float
    kv_use: float
    """Share of the cache."""
    running: int
    waiting: int


def watched(metrics: Metrics, seconds: float) -> Sample:
    return Sample(
        round(seconds, 2),
        round(metrics.value("vllm:kv_cache_usage_perc"), 4),
        int(metrics.value("vllm:num_requests_running")),
        int(metrics.value("vllm:num_requests_waiting")),
    )


async def watch(server: Server, start: float, readings: list[tuple[float, str]]) -> None:
    """Note `/metrics` until cancelled; it is parsed when all is over."""
    while True:
        text = await client.get(HOST, server.port, "/metrics")
        readings.append((time.perf_counter() - start, text))
        await asyncio.sleep(SAMPLE_SECONDS)


async def settled(server: Server, generated: float = 0) -> Metrics:
    """The metrics once nothing runs and they count so many tokens: counting follows answering.

    ServerFailed when that takes too long."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        metrics = await asyncio.to_thread(server.metrics)
        now = watched(metrics, 0)
        if not now.running and not now.waiting and metrics.value(GENERATED) >= generated:
            return metrics
        await asyncio.sleep(0.1)
    raise ServerFailed(f"requests still run {SETTLE_SECONDS:.0f} s after they were done or aborted")


async def level(
    server: Server, settings: Settings, concurrency: int, seconds: float, seed: int = 0
) -> dict[str, Any]:
    """So many requests at once, for at most so many seconds. No prompt was sent before."""
    draw = random.Random(f"{seed} {concurrency}")
    contents = [
        client.body(
            str(settings.model),
            [draw.randrange(PROMPT_IDS) for _ in range(settings.prompt_tokens)],
            settings.tokens,
        )
        for _ in range(concurrency)
    ]
    before = await settled(server)
    readings: list[tuple[float, str]] = []
    start = time.perf_counter()
    watching = asyncio.create_task(watch(server, start, readings))
    try:
        completions, cut = await client.all_at_once(HOST, server.port, contents, seconds)
        took = time.perf_counter() - start
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    samples = [watched(before, 0), *(watched(Metrics(text), at) for at, text in readings)]
    seen = summary(completions, took)
    after = await settled(server, before.value(GENERATED) + seen["tokens"])
    return {
        "concurrency": concurrency,
        "seconds": round(took, 2),
        "cut": cut,
        **seen,
        **counted(before, after),
        "running_mean": round(statistics.fmean(s.running for s in samples), 2),
        "kv_use_mean": round(statistics.fmean(s.kv_use for s in samples), 4),
        "kv_use_peak": max(s.kv_use for s in samples),
        "series": {key: [getattr(s, key) for s in samples] for key in asdict(samples[0])},
    }


def summary(completions: list[client.Completion], seconds: float) -> dict[str, Any]:
    """What the client saw. Events count as tokens until a request is done."""
    tokens = sum(c.tokens if c.tokens is not None else len(c.arrivals) for c in completions)
    gaps = sorted(gap for completion in completions for gap in completion.gaps)
    firsts = [c.arrivals[0] - c.sent for c in completions if c.arrivals]
    return {
        "tokens": tokens,
        "events": sum(len(completion.arrivals) for completion in completions),
        "tokens_per_second": round(tokens / seconds, 1),
        "requests_done": sum(c.tokens is not None for c in completions),
        "inter_token_ms_p50": milliseconds(gaps, 0.5),
        "inter_token_ms_p99": milliseconds(gaps, 0.99),
        "first_token_ms_p50": milliseconds(sorted(firsts), 0.5),
    }


def milliseconds(ordered: list[float], quantile: float) -> float | None:
    """The nearest rank of sorted seconds."""
    if not ordered:
        return None
    rank = min(len(ordered) - 1, int(quantile * len(ordered)))
    return round(1000 * ordered[rank], 2)


def counted(before: Metrics, after: Metrics) -> dict[str, int]:
    """What the server counted on the way; the policy's counters are 0 in stock."""
    names = {
        "preemptions": "vllm:num_preemptions_total",
        "evictions": "gkv:evictions_total",
        "blocks_freed": "gkv:blocks_freed_total",
    }
    return {name: round(after.get(of) - before.get(of)) for name, of in names.items()}


class Budget:
    """Shares the time that is left among the levels to come, by what they are expected to take."""

    def __init__(self, seconds: float, weights: dict[tuple[str, int], float]) -> None:
        self.end = time.monotonic() + seconds
        self.todo = dict(weights)

    def take(self, side: str, concurrency: int) -> float:
        """Seconds for this level; what later servers take to start is set aside."""
        sides_to_come = {of for of, _ in self.todo} - {side}
        left = self.end - time.monotonic() - EXPECTED_START * len(sides_to_come)
        total = sum(self.todo.values())
        return max(10.0, left * self.todo.pop((side, concurrency)) / total)


def weights(settings: Settings, pool_tokens: int) -> dict[tuple[str, int], float]:
    """Stock takes several rounds where the cache is short; larger batches have slower steps."""
    shares = {}
    for concurrency in settings.levels:
        slower = 1 + concurrency / 64
        rounds = max(1.0, concurrency * settings.full_length / 2 / pool_tokens)
        shares[STOCK, concurrency] = rounds * slower
        shares[POLICY, concurrency] = slower
    return shares


def pool_tokens(metrics: Metrics, block_size: int) -> int:
    """What the server's cache holds, without vLLM's null block."""
    return (int(metrics.label("vllm:cache_config_info", "num_gpu_blocks")) - 1) * block_size


def run_side(
    settings: Settings, side: str, seconds: Callable[[int, Metrics], float], log: Path
) -> dict[str, Any]:
    """Start this side's server and run all levels. ServerFailed or RequestFailed say why not."""
    started = time.monotonic()
    with serve(
        settings.model,
        *settings.arguments(side),
        log=log,
        env=settings.environment_of(side),
        start_seconds=START_SECONDS,
    ) as server:
        ready = time.monotonic() - started
        metrics = server.metrics()
        levels = []
        # So that nothing is done for the first time later.
        asyncio.run(level(server, settings, min(settings.levels), WARM_SECONDS, seed=1))
        for concurrency in settings.levels:
            levels.append(
                asyncio.run(level(server, settings, concurrency, seconds(concurrency, metrics)))
            )
            print(line(side, levels[-1]), flush=True)
        return {
            "seconds_to_start": round(ready, 1),
            "pool_tokens": pool_tokens(metrics, settings.flags["block-size"]),
            "levels": levels,
        }


def line(side: str, of: dict[str, Any]) -> str:
    return (
        f"{side:<7} {of['concurrency']:>4} requests: {of['tokens_per_second']:>9,.0f} tok/s, "
        f"between tokens {of['inter_token_ms_p50']} ms (p99 {of['inter_token_ms_p99']}), "
        f"{of['preemptions']} preemptions, {of['running_mean']} running"
        + (", cut short" if of["cut"] else "")
    )


# --- both sides ----------------------------------------------------------------------------------


def measure(settings: Settings, minutes: float, folder: Path) -> dict[str, dict[str, Any]]:
    budget: Budget | None = None
    began = time.monotonic()

    def seconds(side: str, concurrency: int, metrics: Metrics) -> float:
        nonlocal budget
        if budget is None:
            pool = pool_tokens(metrics, settings.flags["block-size"])
            left = 60 * minutes - (time.monotonic() - began)
            budget = Budget(left, weights(settings, pool))
        return budget.take(side, concurrency)

    return {
        side: run_side(
            settings,
            side,
            lambda concurrency, metrics, side=side: seconds(side, concurrency, metrics),  # type: ignore[misc]
            folder / f"serve_ab-{side}.log",
        )
        for side in SIDES
    }


def compare(sides: dict[str, dict[str, Any]], full_length: int) -> list[dict[str, Any]]:
    """Level by level, what the policy makes of stock's throughput."""
    pool = sides[STOCK]["pool_tokens"]
    rows = []
    for stock, policy in zip(sides[STOCK]["levels"], sides[POLICY]["levels"], strict=True):
        concurrency = stock["concurrency"]
        rows.append(
            {
                "concurrency": concurrency,
                "memory": "ample" if concurrency * full_length <= pool else "memory-bound",
                "throughput_ratio": round(
                    policy["tokens_per_second"] / stock["tokens_per_second"], 3
                ),
                "cut": stock["cut"] or policy["cut"],
            }
        )
    return rows


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Throughput and latency by concurrency; the cache and the requests over time, at the most."""
    from gpu import plots

    colours = {STOCK: plots.STOCK, POLICY: plots.POLICY}
    settings = numbers["settings"]
    heading = (
        f"{settings['tokens']:,} tokens per request, {settings['policy'].get('kv-budget')} kept; "
        f"{plots.title(numbers)}"
    )
    with plots.figure(path, heading, 2, rows=2) as (speed, latency, use, running):
        for side, of in numbers["sides"].items():
            levels, colour = of["levels"], colours[side]
            xs = [one["concurrency"] for one in levels]
            speed.plot(
                xs, [x["tokens_per_second"] for x in levels], marker="o", color=colour, label=side
            )
            for quantile, style in (("p50", "-"), ("p99", ":")):
                ys = [one[f"inter_token_ms_{quantile}"] for one in levels]
                latency.plot(xs, ys, style, marker="o", color=colour, label=f"{side}, {quantile}")
            series = levels[-1]["series"]
            use.plot(series["seconds"], [100 * x for x in series["kv_use"]], color=colour)
            running.plot(series["seconds"], series["running"], color=colour)
        for one, label in ((speed, "tokens per second"), (latency, "ms between tokens")):
            one.set_xlabel("requests sent at once")
            one.set_ylabel(label)
            one.set_ylim(bottom=0)
        most = numbers["comparison"][-1]["concurrency"]
        for one, label in ((use, "KV cache in use, %"), (running, "requests running")):
            one.set_xlabel(f"seconds, {most} requests")
            one.set_ylabel(label)
            one.set_ylim(bottom=0)
        plots.legend(latency, 4)


# --- the command ---------------------------------------------------------------------------------


def on_gpu(args: argparse.Namespace) -> Settings:
    """Qwen3-8B's shape in a cache of so many bytes, of which the policy's own needs come off."""
    full = args.prompt_tokens + args.tokens
    flags = {
        "load-format": "dummy",
        "block-size": common.QWEN3_8B.block_size,
        "max-model-len": -(-full // 1024) * 1024,
        "max-num-seqs": max(args.levels),
        "kv-cache-memory-bytes": int(args.cache_gib * 2**30),
        "seed": 0,
    }
    policy = {"kv-policy": "gkv", "kv-budget": args.budget, "kv-interval": args.interval}
    model = make_model(machine.ROOT / "build" / "qwen3-8b-dummy", common.QWEN3_8B)
    return Settings(
        model, flags, policy, tuple(sorted(args.levels)), args.prompt_tokens, args.tokens
    )


def quick(args: argparse.Namespace) -> Settings:
    """The demo model by its own configuration, in less memory; or a tiny one without weights."""
    import yaml

    config = yaml.safe_load(DEMO_CONFIG.read_text())
    policy = {name: value for name, value in config.items() if name.startswith("kv-")}
    flags = {name: value for name, value in config.items() if name not in policy}
    flags |= {"max-model-len": 512, "num-gpu-blocks-override": 33, "seed": 0}
    flags |= {"max-num-seqs": 8, "enforce-eager": True}
    policy |= {"kv-budget": 96, "kv-interval": 32}
    model = DEMO_MODEL
    if args.dummy or args.device == "cuda":
        model = make_model(machine.ROOT / "build" / "tiny-dummy", common.TINY, positions=2048)
        flags |= {"load-format": "dummy"}
    elif not (model / "config.json").exists():
        make_model(machine.ROOT / "build" / "tiny-dummy", common.TINY)  # makes the demo model too
    return Settings(model, flags, policy, (2, 8), 32, 300)


def parse_args() -> argparse.Namespace:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--budget-minutes", type=float, default=15.0, help="for all of it")
    parser.add_argument("--levels", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--tokens", type=int, default=8192, help="per request")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--budget", type=int, default=1024, help="tokens that the policy keeps")
    parser.add_argument("--interval", type=int, default=128)
    parser.add_argument("--cache-gib", type=float, default=24.0, help="KV cache of both sides")
    parser.add_argument(
        "--dummy", action="store_true", help="with --quick: dummy weights, as in a measurement"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.draw:
        common.redraw(args.draw, draw)
        return 0
    common.use(args, kernels=False)
    folder = common.out_folder(args)
    settings = quick(args) if args.quick else on_gpu(args)
    facts = common.describe(args.device)
    logs = machine.ROOT / "build" / "logs"
    try:
        sides = measure(settings, args.budget_minutes, logs)
    except (ServerFailed, client.RequestFailed) as failure:
        print(failure, file=sys.stderr)
        return 1
    comparison = compare(sides, settings.full_length)
    for row in comparison:
        print(
            f"{row['concurrency']} requests, {row['memory']}: {row['throughput_ratio']:.3f} of the "
            "throughput of stock" + (", of a level that was cut short" if row["cut"] else "")
        )
    asked = asdict(settings) | {"model": settings.model.name}
    numbers = {
        "machine": facts,
        "quick": args.quick,
        "settings": asked,
        "sides": sides,
        "comparison": comparison,
    }
    common.write(folder / "serve_ab.json", numbers, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
