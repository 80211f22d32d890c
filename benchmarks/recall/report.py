# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Turns recall.json into tables with bootstrap intervals and a plot; measures nothing.

`python -m benchmarks.recall.report` writes both again from the numbers that are there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy

from benchmarks.recall import settings

RESAMPLES = 4000
Row = dict[str, Any]


def write_json(result: dict[str, Any], path: Path) -> None:
    """One line per row, so that differences between two measurements can be read."""
    rows = ",\n".join("  " + json.dumps(row) for row in result["rows"])
    head = json.dumps({**result, "rows": []}, indent=1).removesuffix("[]\n}")
    path.write_text(f"{head}[\n{rows}\n ]\n}}\n")


def write(result: dict[str, Any], path: Path) -> None:
    """The JSON, and beside it the tables and the plot, if the main table is there."""
    from benchmarks.recall import plot

    write_json(result, path)
    if not rows_of(result, "policies"):
        return
    path.with_suffix(".md").write_text(tables(result))
    plot.draw(result, path.with_suffix(".png"))


# ---- statistics


class Bootstrap:
    """Accuracies and differences of accuracies, with 95 % intervals over streams.

    Every number uses the same resampled streams, so differences are paired."""

    def __init__(self, result: dict[str, Any]) -> None:
        streams = result["streams"]
        self.totals = {
            "right": numpy.array(streams["answers"]),
            "far_right": numpy.array(streams["far_answers"]),
        }
        count = streams["count"]
        draws = numpy.random.default_rng(0).integers(count, size=(RESAMPLES, count))
        self.weights = numpy.stack([numpy.bincount(draw, minlength=count) for draw in draws])

    def accuracy(self, rows: list[Row], what: str) -> tuple[float, numpy.ndarray]:
        """Of these rows (one per model) together, and in each resample."""
        right = numpy.mean([row[what] for row in rows], axis=0)
        total = self.totals[what]
        return right.sum() / total.sum(), (self.weights @ right) / (self.weights @ total)

    def interval(self, rows: list[Row], what: str) -> tuple[float, float, float]:
        """Accuracy, and the ends of its interval."""
        value, samples = self.accuracy(rows, what)
        return value, *numpy.percentile(samples, (2.5, 97.5))

    def difference(self, rows: list[Row], base: list[Row], what: str) -> tuple[float, float, float]:
        """Accuracy over that of `base`, and the ends of its interval."""
        value, samples = self.accuracy(rows, what)
        base_value, base_samples = self.accuracy(base, what)
        return value - base_value, *numpy.percentile(samples - base_samples, (2.5, 97.5))


# ---- which rows


def rows_of(result: dict[str, Any], *tables: str) -> list[Row]:
    return [row for row in result["rows"] if row["table"] in tables]


def key(row: Row) -> tuple[str, str, int]:
    return row["label"], row["form"], row["budget"]


def grouped(rows: list[Row]) -> dict[tuple[str, str, int], list[Row]]:
    """Rows that differ in the model alone, together and in order."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


# ---- text


def line(result: dict[str, Any], row: Row) -> str:
    """One row while the study runs."""
    totals = result["streams"]
    right = sum(row["right"]) / sum(totals["answers"])
    far = sum(row["far_right"]) / sum(totals["far_answers"])
    return (
        f"{row['table']:12s} seed {row['seed']} budget {row['budget']:3d}  {row['label']:24s} "
        f"{row['form']:12s} all {right:.3f}  far {far:.3f}  {row['evictions']:5d} evictions  "
        f"{row['ms_per_eviction'] or 0:.2f} ms each  {row['ms_per_step']:.2f} ms a step"
    )


HEAD = (
    "| policy | form | accuracy | far | minus gkv token/head | far | evictions | ms each |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def tables(result: dict[str, Any]) -> str:
    """The whole of recall.md."""
    stats, streams = Bootstrap(result), result["streams"]
    seeds = sorted({row["seed"] for row in rows_of(result, "policies", "models")})
    parts = [
        "<!-- SPDX-License-Identifier: Apache-2.0 -->\n"
        "<!-- SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project -->\n",
        "# Recall under eviction\n",
        "Written by `benchmarks/recall/report.py`; benchmarks/recall/README.md says how to read "
        f"it.\n{streams['count']} streams of {streams['length']} tokens, "
        f"{sum(streams['answers']):,} answers, {sum(streams['far_answers']):,} of them far "
        f"(value last seen more than {settings.FAR} tokens ago). Interval {settings.INTERVAL}, "
        f"window {settings.WINDOW}, blocks of 32 tokens, nothing protected. In brackets: 95 % "
        "intervals, bootstrap over streams.\n",
    ]
    main = rows_of(result, "policies", "models")
    base = grouped(main)["gkv", "token/head", settings.BUDGET]
    parts += [f"## Budget {settings.BUDGET}, mean of {len(seeds)} models\n", HEAD]
    parts += [_table_row(stats, group, base) for group in grouped(main).values()]
    if len(seeds) > 1:
        parts += ["\n## The same, model by model\n", _model_table(result, seeds)]
    for budget in settings.OTHER_BUDGETS:
        rows = [row for row in rows_of(result, "budgets") if row["budget"] == budget]
        parts += _section(stats, f"Budget {budget}, model 0", rows)
    first = [row for row in rows_of(result, "policies") if row["label"] == "gkv"]
    parts += _section(
        stats, f"Variants, budget {settings.BUDGET}, model 0", first + rows_of(result, "variants")
    )
    parts += _section(
        stats,
        f"The model's own answers stay in the stream, budget {settings.BUDGET}, model 0",
        rows_of(result, "own answers"),
    )
    return "\n".join(parts).replace("|\n\n|", "|\n|")


def _section(stats: Bootstrap, title: str, rows: list[Row]) -> list[str]:
    base = [row for row in rows if (row["label"], row["form"]) == ("gkv", "token/head")]
    if not base:
        return []
    return [f"\n## {title}\n", HEAD, *(_table_row(stats, [row], base) for row in rows)]


def _table_row(stats: Bootstrap, group: list[Row], base: list[Row]) -> str:
    cells = [_bracketed(*stats.interval(group, what)) for what in stats.totals]
    for what in stats.totals:
        same = group is base or group == base
        cells.append("" if same else _bracketed(*stats.difference(group, base, what), sign="+"))
    times = [row["ms_per_eviction"] for row in group if row["ms_per_eviction"]]
    row, milliseconds = group[0], f"{numpy.mean(times):.2f}" if times else ""
    cells += [str(row["evictions"]), milliseconds]
    return " | ".join([f"| {row['label']}", row["form"], *cells]) + " |"


def _bracketed(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _model_table(result: dict[str, Any], seeds: list[int]) -> str:
    streams = result["streams"]
    lines = ["| policy | form | " + " | ".join(f"model {seed}, far" for seed in seeds) + " |"]
    lines.append("|---|---|" + "---|" * len(seeds))
    for (label, form, _), group in grouped(rows_of(result, "policies", "models")).items():
        cells = [
            f"{sum(row['right']) / sum(streams['answers']):.3f}, "
            f"{sum(row['far_right']) / sum(streams['far_answers']):.3f}"
            for row in group
        ]
        lines.append(f"| {label} | {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    default = Path(__file__).parents[1] / "results" / "cpu" / "recall.json"
    write(json.loads((source or default).read_text()), source or default)
