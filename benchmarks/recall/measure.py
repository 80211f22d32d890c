# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Runs every setting of the study in an engine of its own and writes recall.json.

`python -m benchmarks.recall.measure`, from the root of the repository. Writes after each setting;
`--only TABLE` measures one table again and leaves the others as they are.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.recall import engine, report, settings, task
from benchmarks.recall.engine import Run
from benchmarks.recall.settings import Setting
from benchmarks.recall.task import Stream

RESULT = Path(__file__).parents[1] / "results" / "cpu" / "recall.json"
STREAM_SEED = 10_000
"""Far from the seeds of training."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("build/recall-model"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--streams", type=int, default=96)
    parser.add_argument("--only", metavar="TABLE", help="one table of the study")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


def by_stream(streams: list[Stream], said: list[list[int]]) -> dict[str, list[int]]:
    """Right answers of each stream: all, and the far ones."""
    right, far = [], []
    for stream, words in zip(streams, said, strict=True):
        good = [
            answer
            for answer, word in zip(stream.answers, words, strict=True)
            if word == stream.tokens[answer.position]
        ]
        right.append(len(good))
        far.append(sum(answer.age > settings.FAR for answer in good))
    return {"right": right, "far_right": far}


def check_evicted(setting: Setting, run: Run, streams: int) -> None:
    """Every stream lost what it had to, whenever it had to, and nothing was skipped."""
    wanted = setting.expected_evictions * streams
    assert run.evictions == wanted, f"{setting}: {run.evictions} evictions, not {wanted}"
    assert run.tokens_evicted == wanted * settings.INTERVAL, setting
    assert not run.skipped, f"{setting}: skipped {run.skipped}"
    if setting.policy is not None:
        assert set(run.live_tokens) == {setting.budget}, f"{setting}: {run.live_tokens}"


def measure(setting: Setting, models: Path, streams: list[Stream]) -> dict[str, Any]:
    model = models / f"seed-{setting.seed}"
    run = engine.run(model, streams, setting.kv_policy, own_answers=setting.own_answers)
    check_evicted(setting, run, len(streams))
    times = list(chain.from_iterable(repeat(us, count) for us, count in run.eviction_us.items()))
    return {
        **asdict(setting),
        "kv_policy": setting.kv_policy,
        "evictions": run.evictions,
        "tokens_evicted": run.tokens_evicted,
        "ms_per_eviction": round(statistics.median(times) / 1e3, 3) if times else None,
        "ms_per_step": round(run.seconds / run.steps * 1e3, 3),
        **by_stream(streams, run.said),
    }


def main() -> None:
    args = parse_args()
    rng = random.Random(STREAM_SEED)
    streams = [task.draw(rng, settings.LENGTH) for _ in range(args.streams)]
    rows = []
    if args.only and args.out.exists():
        rows = [r for r in json.loads(args.out.read_text())["rows"] if r["table"] != args.only]
    result = {
        "machine": describe(),
        "streams": {
            "count": len(streams),
            "seed": STREAM_SEED,
            "length": settings.LENGTH,
            "answers": [len(stream.answers) for stream in streams],
            "far_answers": [
                sum(answer.age > settings.FAR for answer in stream.answers) for stream in streams
            ],
        },
        "rows": rows,
    }
    for setting in settings.study(args.seeds):
        if args.only in (None, setting.table):
            rows.append(measure(setting, args.models, streams))
            report.write_json(result, args.out)
            print(report.line(result, rows[-1]), flush=True)
    report.write(result, args.out)


if __name__ == "__main__":
    main()
