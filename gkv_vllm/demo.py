# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""`make demo`: one real server, the same questions without and with eviction, one table.

The small reasoner of `models/` keeps a ledger: the prompt sets facts, the text overwrites them and
asks for them again, and every answer can be checked.

What it prints is measured through HTTP and `/metrics`; the speed of the engine alone is measured by
`make bench-cpu`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkv_vllm.eval.exams import EXAMS, Question
from gkv_vllm.eval.tasks import Grade
from gkv_vllm.serving import (
    Metrics,
    Server,
    ServerFailed,
    generated,
    openai_client,
    serve,
    settled,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from rich.console import Console

SAMPLE_SECONDS = 0.25
SETTLE_SECONDS = 5.0
# vLLM collects this many tokens into one event of a stream; fewer events leave the cores to it.
STREAM_INTERVAL = 16
EXAM = EXAMS["ledger-free"]
PROMPT_ROOM = 128
EXCERPT_WORDS = 60

Report = Callable[[float, float], None]
"""Told the tokens generated and the blocks in use, a few times a second."""


@dataclass(frozen=True)
class Settings:
    """What is asked of the server, from the command line."""

    model: Path
    requests: int
    tokens: int
    policy: str
    budget: int
    interval: int
    block_size: int
    blocks: int
    log: Path

    def server_arguments(self) -> list[str]:
        flags = {
            "--kv-policy": self.policy,
            "--kv-budget": self.budget,
            "--kv-interval": self.interval,
            "--block-size": self.block_size,
            "--num-gpu-blocks-override": self.blocks,
            "--max-model-len": self.tokens + PROMPT_ROOM,
            "--stream-interval": STREAM_INTERVAL,
        }
        return ["--enforce-eager", *(str(word) for flag in flags.items() for word in flag)]


@dataclass
class Run:
    """What one pass over the requests took, as the server's own counters tell it."""

    policy: str
    completion_tokens: list[int] = field(default_factory=list)
    """Of each request that finished because it reached its length."""
    texts: list[str] = field(default_factory=list)
    grades: list[Grade] = field(default_factory=list)
    seconds: float = 0.0
    blocks_in_use: list[int] = field(default_factory=list)
    blocks_per_request: list[float] = field(default_factory=list)
    requests_running: list[float] = field(default_factory=list)
    evictions: int = 0
    blocks_freed: int = 0
    preemptions: int = 0

    def sample(self, metrics: Metrics) -> int:
        """Note how many blocks are in use now."""
        used = round(metrics.value("vllm:kv_cache_usage_perc") * usable_blocks(metrics))
        running = metrics.value("vllm:num_requests_running")
        if running:
            self.blocks_in_use.append(used)
            self.blocks_per_request.append(used / running)
            self.requests_running.append(running)
        return used

    def count(self, before: Metrics, after: Metrics) -> None:
        def grown(name: str) -> int:
            return round(after.value(name) - before.value(name))

        self.evictions = grown("gkv:evictions_total")
        self.blocks_freed = grown("gkv:blocks_freed_total")
        self.preemptions = grown("vllm:num_preemptions_total")

    @property
    def right(self) -> int:
        return sum(answer.right for grade in self.grades for answer in grade.answers)

    @property
    def answers(self) -> int:
        return sum(len(grade.answers) for grade in self.grades)

    def summary(self) -> dict[str, Any]:
        tokens = sum(self.completion_tokens)
        return {
            "policy": self.policy,
            "requests_finished": len(self.completion_tokens),
            "tokens": tokens,
            "facts_asked": self.answers,
            "facts_right_percent": round(100 * self.right / self.answers, 1) if self.answers else 0,
            # None where the run was over before the server could be asked.
            "requests_running_mean": mean(self.requests_running),
            "blocks_in_use_peak": peak(self.blocks_in_use),
            "blocks_in_use_mean": mean(self.blocks_in_use),
            "blocks_per_request_peak": peak(self.blocks_per_request),
            "blocks_per_request_mean": mean(self.blocks_per_request),
            "blocks_freed": self.blocks_freed,
            "evictions": self.evictions,
            "preemptions": self.preemptions,
            "seconds": round(self.seconds, 1),
            "tokens_per_second": round(tokens / self.seconds) if self.seconds else 0,
        }


def mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 1) if values else None


def peak(values: Sequence[float]) -> float | None:
    return round(max(values), 1) if values else None


def usable_blocks(metrics: Metrics) -> int:
    """Blocks of the pool that requests can hold: all but vLLM's null block."""
    return int(metrics.label("vllm:cache_config_info", "num_gpu_blocks")) - 1


# --- the requests --------------------------------------------------------------------------------


Ask = Callable[[str, int, str], Awaitable[tuple[int, str]]]
"""`complete`, bound to a client and a model: prompt, tokens, policy."""


def questions(settings: Settings) -> list[Question]:
    """One ledger per request, the same ones for both policies."""
    return [EXAM.question(seed, settings.tokens) for seed in range(settings.requests)]


async def complete(
    client: AsyncOpenAI, model: str, prompt: str, tokens: int, policy: str
) -> tuple[int, str]:
    """Stream one completion to its end; how many tokens the server says it has, and its text.

    Without a seed of its own: stock vLLM on a CPU ends when a seeded prompt comes in chunks, as
    that of a preempted request does."""
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=EXAM.sampling["temperature"],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={
            "ignore_eos": True,
            "min_p": EXAM.sampling["min_p"],
            "vllm_xargs": {"kv_policy": policy},
        },
    )
    completed, parts = 0, []
    async for event in stream:
        parts += [choice.text for choice in event.choices]
        if event.usage is not None:
            completed = event.usage.completion_tokens
    return completed, "".join(parts)


async def watch(server: Server, run: Run, before: Metrics, report: Report) -> None:
    """Sample the server until cancelled."""
    while True:
        metrics = await asyncio.to_thread(server.metrics)
        used = run.sample(metrics)
        report(generated(metrics) - generated(before), used)
        await asyncio.sleep(SAMPLE_SECONDS)


async def measure(server: Server, ask: Ask, settings: Settings, policy: str, report: Report) -> Run:
    """All requests at once, each under this policy."""
    run, before, start = Run(policy), server.metrics(), time.perf_counter()
    watching = asyncio.create_task(watch(server, run, before, report))
    try:
        asked = questions(settings)
        completed = await asyncio.gather(
            *(ask(question.text, settings.tokens, policy) for question in asked)
        )
        run.seconds = time.perf_counter() - start
        run.completion_tokens = [tokens for tokens, _ in completed]
        run.texts = [text for _, text in completed]
        run.grades = [
            EXAM.grade(question, text.split())
            for question, text in zip(asked, run.texts, strict=True)
        ]
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    after = await settled(server, generated(before) + sum(run.completion_tokens), SETTLE_SECONDS)
    run.count(before, after)
    report(generated(after) - generated(before), 0)
    return run


async def compare(server: Server, settings: Settings, console: Console) -> list[Run]:
    """One pass without eviction, which is what stock vLLM does, and one with it."""
    async with openai_client(server) as client:
        (model,) = (await client.models.list()).data
        ask = partial(complete, client, model.id)
        await ask("warm up", 32, settings.policy)
        with progress_bars(console) as progress:
            runs = []
            for policy in ("none", settings.policy):
                task = progress.add_task(
                    f"kv_policy={policy}", total=settings.requests * settings.tokens, blocks=0
                )

                def report(tokens: float, blocks: float, task: Any = task) -> None:
                    progress.update(task, completed=tokens, blocks=round(blocks))

                runs.append(await measure(server, ask, settings, policy, report))
    return runs


# --- what is shown -------------------------------------------------------------------------------


def progress_bars(console: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TextColumn("{task.fields[blocks]:>4} blocks"),
        TimeElapsedColumn(),
        console=console,
    )


ROWS = {
    "tokens": "tokens generated",
    "requests_running_mean": "requests running together, mean",
    "blocks_per_request_peak": "blocks held per request, peak",
    "blocks_per_request_mean": "blocks held per request, mean",
    "blocks_in_use_peak": "blocks in use, peak",
    "blocks_freed": "blocks freed while running",
    "evictions": "evictions",
    "preemptions": "preemptions",
    "facts_asked": "facts asked for",
    "facts_right_percent": "facts right, %",
    "seconds": "wall time, s",
    "tokens_per_second": "tokens per second",
}


def show(console: Console, settings: Settings, runs: list[Run]) -> None:
    from rich.table import Table

    table = Table(
        title=f"{settings.requests} requests x {settings.tokens} tokens on one server, "
        f"{settings.blocks} blocks of {settings.block_size} tokens"
    )
    table.add_column()
    summaries = [run.summary() for run in runs]
    for summary in summaries:
        table.add_column(f"kv_policy={summary['policy']}", justify="right")
    for key, label in ROWS.items():
        cells = ("not seen" if x[key] is None else f"{x[key]:,}" for x in summaries)
        table.add_row(label, *cells)
    console.print(table)
    show_excerpt(console, settings, runs[-1])


def show_excerpt(console: Console, settings: Settings, run: Run) -> None:
    """How one text ends, answers in colour, and how long ago the oldest of them was written."""
    from rich.text import Text

    question, text, grade = questions(settings)[0], run.texts[0].split(), run.grades[0]
    words, first = question.prompt + text, len(question.prompt) + len(text) - EXCERPT_WORDS
    marks = {answer.position: answer for answer in grade.answers if answer.position >= first}
    shown = Text(f"How request 0 ends with kv_policy={run.policy} (x= sets a fact, x? asks):\n...")
    for position in range(max(first, 0), len(words)):
        style = ""
        if position in marks:
            style = "bold green" if marks[position].right else "bold red"
        shown.append(f" {words[position]}", style=style)
    oldest = max(grade.answers, key=lambda answer: answer.right * answer.age, default=None)
    if oldest is not None and oldest.right:
        shown.append(
            f"\nIts oldest right answer, {words[oldest.position - 1]} {words[oldest.position]}, "
            f"was last written {oldest.age} tokens before, with a budget of {settings.budget}."
        )
    console.print(shown)


def verdict(settings: Settings, stock: Run, policy: Run) -> tuple[bool, str]:
    """Whether the run proves eviction, and a sentence that says what was proven or what failed."""
    wrong = []
    for run in (stock, policy):
        short = [n for n in run.completion_tokens if n != settings.tokens]
        if short:
            wrong.append(
                f"with kv_policy={run.policy}, {len(short)} of {settings.requests} requests "
                f"finished with other than {settings.tokens} tokens"
            )
    if not policy.evictions:
        wrong.append("no eviction happened")
    if stock.evictions:
        wrong.append(f"{stock.evictions} evictions hit requests that had opted out")
    if wrong:
        return False, "Failed: " + "; ".join(wrong) + "."
    return True, (
        f"Proven: {policy.evictions:,} evictions freed {policy.blocks_freed:,} KV blocks of "
        f"running requests, and all {2 * settings.requests} requests of both runs finished with "
        f"the {settings.tokens:,} tokens asked for. Of the facts that the texts asked for, "
        f"{_percent(policy)} were right with eviction and {_percent(stock)} without."
    )


def _percent(run: Run) -> str:
    return f"{100 * run.right / run.answers:.1f} %" if run.answers else "none"


# --- the command ---------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> tuple[Settings, bool]:
    parser = argparse.ArgumentParser(prog="python -m gkv_vllm.demo", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/reasoner"))
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=1000, help="per request")
    parser.add_argument("--policy", default="gkv")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--interval", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=320, help="size of the KV cache")
    parser.add_argument("--log", type=Path, default=Path("build/demo-server.log"))
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    arguments = vars(parser.parse_args(argv))
    as_json = arguments.pop("json")
    if not (arguments["model"] / "config.json").exists():
        parser.error(f"no model at {arguments['model']}; run this from the root of the repository")
    return Settings(**arguments), as_json


def run_demo(settings: Settings, console: Console) -> list[Run]:
    arguments = settings.server_arguments()
    console.print(
        f"vllm serve {settings.model} {' '.join(arguments)}", highlight=False, soft_wrap=True
    )
    console.print(f"Starting it takes about a minute; its log is {settings.log}.")
    start = time.perf_counter()
    with serve(settings.model, *arguments, log=settings.log) as server:
        console.print(f"Ready after {time.perf_counter() - start:.0f} s.")
        return asyncio.run(compare(server, settings, console))


def main(argv: list[str] | None = None) -> int:
    from openai import OpenAIError
    from rich.console import Console

    settings, as_json = parse_args(argv)
    console = Console(stderr=as_json)
    # A terminated demo stops its server the way Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        runs = run_demo(settings, console)
    except KeyboardInterrupt:
        console.print("Interrupted; the server is stopped.")
        return 130
    except (ServerFailed, OpenAIError, OSError) as error:
        console.print(f"Failed: {error}", markup=False, highlight=False)
        return 1
    ok, sentence = verdict(settings, *runs)
    show(console, settings, runs)
    console.print(sentence, highlight=False)
    if as_json:
        print(json.dumps(_as_json(settings, runs, ok), indent=2))
    return 0 if ok else 1


def _as_json(settings: Settings, runs: list[Run], ok: bool) -> dict[str, Any]:
    asked = {k: v for k, v in asdict(settings).items() if k not in ("model", "log")}
    return {"ok": ok, "settings": asked, "runs": [run.summary() for run in runs]}


if __name__ == "__main__":
    sys.exit(main())
