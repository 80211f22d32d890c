# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Runs a plan: starts its servers one after another, asks, and stores each cell; goes on later."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkv_vllm.config import ConfigError, unknown_key
from gkv_vllm.eval import ask
from gkv_vllm.eval.exams import EXAMS
from gkv_vllm.eval.plan import Cell, Plan, ServerPlan
from gkv_vllm.eval.store import PLAN, Store, commit
from gkv_vllm.serving import Endpoint, generated, openai_client, serve, settled

if TYPE_CHECKING:
    from openai import AsyncOpenAI

FAR = 256
"""An answer whose fact was last written more words ago is counted apart as well."""
SETTLE_SECONDS = 10.0
RECORD_SECONDS = 10.0
CELL_SECONDS = 3600.0
"""An answer may take this long."""
COUNTED = {
    "evictions": "gkv:evictions_total",
    "tokens_evicted": "gkv:tokens_evicted_total",
    "blocks_freed": "gkv:blocks_freed_total",
    "skipped": "gkv:skipped_total",
    "preemptions": "vllm:num_preemptions_total",
    "generated": "vllm:generation_tokens_total",
}
Report = Callable[[str, int, int], None]
"""Told a cell's name, how many of its answers came, and how many are due."""


@dataclass
class Runner:
    """One plan, its results, and how long it may take."""

    plan: Plan
    store: Store
    minutes: float
    report: Report
    url: str | None = None
    """A server that is up already; only the cells of its own settings can run there."""
    only: str | None = None

    def __post_init__(self) -> None:
        labels = [server.label for server in self.plan.server_plans()]
        if self.only is not None and self.only not in labels:
            raise ConfigError(unknown_key("server", self.only, labels))
        if self.url is not None and self.only is None and len(labels) > 1:
            raise ConfigError(
                f"--url is one server, and this plan has {len(labels)}; name the one that runs "
                f"there with --only: {', '.join(labels)}"
            )
        self.weights = weights_hash(Path(self.plan.model))
        self.deadline = time.monotonic() + 60 * self.minutes

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def run(self) -> int:
        """Run what is not stored yet; returns how many cells are still missing.

        Raises ServerFailed, openai.OpenAIError or OSError; stored cells stay."""
        self.store.write_environment()
        for server in self.plan.server_plans():
            if self.only not in (None, server.label):
                continue
            due = [cell for cell in server.cells if not self.store.has(cell.name)]
            for cell in server.cells:
                if cell not in due:
                    self.store.check(cell, self._config(server, cell))
            if not due or self.over:
                continue
            with self._server(server) as running:
                asyncio.run(self._cells(running, server, due))
        return self.missing()

    def missing(self) -> int:
        cells = {
            cell.name
            for server in self.plan.server_plans()
            for cell in server.cells
            if self.only in (None, server.label)
        }
        return sum(not self.store.has(name) for name in cells)

    @contextmanager
    def _server(self, server: ServerPlan) -> Iterator[Endpoint]:
        if self.url is not None:
            yield _attached(self.url, server)
            return
        check_model(self.plan.model)
        log = self.store.root / "logs" / f"{server.label}.log"
        with serve(
            self.plan.model, *server.arguments(self.plan, self._records), log=log
        ) as running:
            yield running

    async def _cells(self, running: Endpoint, server: ServerPlan, due: Sequence[Cell]) -> None:
        async with openai_client(running, timeout=CELL_SECONDS) as client:
            (model,) = (await client.models.list()).data
            for cell in due:
                if self.over:
                    return
                await self._cell(running, client, model.id, server, cell)

    def _config(self, server: ServerPlan, cell: Cell) -> dict[str, Any]:
        """All that decides a cell's numbers, besides code and machine."""
        plan = self.plan
        return {
            **asdict(cell),
            "kv_policy": dict(server.kv_policy),
            "block_size": server.block_size,
            "length": plan.length,
            "far": FAR,
            "model": plan.model,
            "weights": self.weights,
            "dtype": plan.dtype,
            "concurrency": plan.concurrency,
            "samples": plan.samples,
            "first_seed": plan.first_seed,
            "mode": EXAMS[cell.exam].mode,
            "sampling": dict(EXAMS[cell.exam].sampling),
            "attached": self.url,
        }

    async def _cell(
        self, running: Endpoint, client: AsyncOpenAI, model: str, server: ServerPlan, cell: Cell
    ) -> None:
        plan, exam = self.plan, EXAMS[cell.exam]
        seeds = range(plan.first_seed, plan.first_seed + plan.samples)
        questions = [exam.question(seed, plan.length) for seed in seeds]
        count = 0

        def done() -> None:
            nonlocal count
            count += 1
            self.report(cell.name, count, len(questions))

        before, started = running.metrics(), time.perf_counter()
        record = 0 if cell.budget is None else plan.record
        predictions = await ask.ask_all(
            client, model, exam, questions, cell.xargs, FAR, done, record
        )
        seconds = time.perf_counter() - started
        tokens = generated(before) + sum(p.words for p in predictions)
        after = await settled(running, tokens, SETTLE_SECONDS)
        counted = {
            name: round(after.get(metric) - before.get(metric)) for name, metric in COUNTED.items()
        }
        measured = {**counted, "seconds": round(seconds, 2), "commit": commit()}
        metrics = cell_metrics(predictions, measured)
        records = [await self._record(prediction) for prediction in predictions[:record]]
        self.store.write(cell.name, predictions, metrics, self._config(server, cell), records)

    @property
    def _records(self) -> Path:
        """Where servers write what the plan wants recorded."""
        return self.store.root / "records"

    async def _record(self, prediction: ask.Prediction) -> Path:
        """The file of a request that was recorded; ConfigError if none comes."""
        until = time.monotonic() + RECORD_SECONDS
        while not (found := sorted(self._records.glob(f"{prediction.request}*.npz"))):
            if time.monotonic() > until:
                raise ConfigError(
                    f"no record of {prediction.request} in {self._records}: with --url, start the "
                    f"server with --kv-record-positions {self._records.resolve()}"
                )
            await asyncio.sleep(0.1)
        return found[0]


def _attached(url: str, server: ServerPlan) -> Endpoint:
    """A server that somebody else started; ConfigError unless it serves the plan's policy."""
    running = Endpoint(url.rstrip("/").removesuffix("/v1"))
    try:
        served = running.metrics().label("gkv:policy_info", "policy")
    except KeyError:
        raise ConfigError(
            f"the server at {url} has no kv policy: start it with --kv-policy"
        ) from None
    asked = server.kv_policy.get("policy")
    if served != asked:
        raise ConfigError(
            f"the server at {url} runs kv policy {served!r}, the plan's server "
            f"{server.label!r} asks for {asked!r}; choose another with --only"
        )
    return running


def summary(predictions: Sequence[ask.Prediction]) -> dict[str, Any]:
    """A cell in numbers: shares over all answers, means over texts."""

    def share(right: int, of: int) -> float | None:
        return round(right / of, 5) if of else None

    lost = [p.loss for p in predictions if p.loss is not None]
    return {
        "samples": len(predictions),
        "answers": sum(p.answers for p in predictions),
        "accuracy": share(sum(p.right for p in predictions), sum(p.answers for p in predictions)),
        "answers_far": sum(p.answers_far for p in predictions),
        "accuracy_far": share(
            sum(p.right_far for p in predictions), sum(p.answers_far for p in predictions)
        ),
        "all_right": share(sum(p.all_right for p in predictions), len(predictions)),
        "broken": sum(p.broken for p in predictions),
        "loop_rate": share(sum(p.loops for p in predictions), len(predictions)),
        "words_mean": round(sum(p.words for p in predictions) / len(predictions), 1),
        "cut_off": share(sum(p.finish_reason == "length" for p in predictions), len(predictions)),
        "loss": round(sum(lost) / len(lost), 5) if lost else None,
    }


def cell_metrics(
    predictions: Sequence[ask.Prediction], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """What was measured and `summary`; `evicted`: whether there was an eviction for each text."""
    evicted = measured["evictions"] >= len(predictions)
    return {**measured, **summary(predictions), "evicted": evicted}


def check_model(model: str) -> None:
    """ConfigError unless there is a model."""
    if not (Path(model) / "config.json").is_file():
        raise ConfigError(
            f"model {model} is no folder with a config.json, seen from here; exams ask in the "
            "words of models/reasoner, or of a model that gkv_vllm.eval.train made"
        )


def weights_hash(model: Path) -> str | None:
    """Of the weight files, or None where there are none here (`--url`)."""
    files = sorted(model.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16] if files else None


def regrade(store: Store) -> int:
    """Grade all stored texts by the present rules; returns how many cells there are."""
    for name in store.cells():
        config, metrics = store.config(name), store.metrics(name)
        exam, again = EXAMS[config["exam"]], []
        for old in store.predictions(name):
            question = exam.question(old["seed"], config["length"])
            if question.text != old["prompt"]:
                raise ConfigError(
                    f"{name}: seed {old['seed']} draws another prompt now; run it again"
                )
            new = ask.predict(exam, question, old["text"], old["finish_reason"], config["far"])
            again.append(replace(new, loss=old["loss"]))
        store.write(name, again, cell_metrics(again, metrics), config)
    return len(store.cells())


@contextmanager
def progress() -> Iterator[Report]:
    """A bar for each cell, from when it is first told of."""
    from rich.progress import Progress

    with Progress() as shown:
        bars: dict[str, Any] = {}

        def tell(cell: str, done: int, due: int) -> None:
            if cell not in bars:
                bars[cell] = shown.add_task(cell, total=due)
            shown.update(bars[cell], completed=done)

        yield tell


def open_store(out: Path, plan_file: Path) -> Store:
    """The folder of a run, with a copy of its plan."""
    out.mkdir(parents=True, exist_ok=True)
    (out / PLAN).write_text(plan_file.read_text())
    return Store(out)
