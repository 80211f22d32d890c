# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Tables and plots from a folder of cells; measures nothing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gkv_vllm.config import ConfigError, unknown_key
from gkv_vllm.eval.statistics import compare, holm, per_text, ratio, share
from gkv_vllm.eval.store import Store

FEW_QUESTIONS = 0.7
HEADER = (
    "| server | budget | protect | accuracy (95 %) | of full (95 %) | far | far asked "
    "| all right | vs baseline | p | win/tie/loss | words | loops | astray | evictions |\n"
    + "|---" * 15
    + "|"
)


def rows(store: Store, baseline: str) -> list[dict[str, Any]]:
    """One row per cell: shares, intervals, and paired comparisons with the baseline's cell.

    In the order of the plan. Raises ConfigError when no cell is there, or none of the baseline."""
    cells = store.in_order()
    if not cells:
        raise ConfigError(f"{store.root} holds no finished cell")
    servers = sorted({config["server"] for config in cells.values()})
    if baseline not in servers:
        raise ConfigError(unknown_key("baseline", baseline, servers))
    texts = {name: store.predictions(name) for name in cells}
    found = [_row(name, config, store, texts, baseline) for name, config in cells.items()]
    _mark_significant(found)
    return found


def _row(
    name: str,
    config: dict[str, Any],
    store: Store,
    texts: dict[str, list[dict[str, Any]]],
    baseline: str,
) -> dict[str, Any]:
    own = per_text(texts[name])
    all_of, far = share(list(own.values())), share(list(per_text(texts[name], far=True).values()))
    keys = ("server", "exam", "budget", "protect", "length")
    row: dict[str, Any] = {"cell": name, **store.metrics(name), **{k: config[k] for k in keys}}
    row |= {"accuracy": all_of.value, "low": all_of.low, "high": all_of.high}
    row |= {"far": None if far.value != far.value else far.value}
    full = texts.get(f"{config['exam']}__full")
    if config["budget"] is not None and full is not None:
        row |= _of_full(own, per_text(full))
        row["questions"] = _asked(texts[name]) / _asked(full) if _asked(full) else None
    other = f"{config['exam']}__{baseline}__b{config['budget']}__{config['protect']}"
    # Where nothing was evicted on either side there is nothing to compare.
    if other in texts and other != name and row["evicted"] and store.metrics(other)["evicted"]:
        row["against"] = _paired(own, per_text(texts[other]))
    return row


def _of_full(own: dict[int, float], full: dict[int, float]) -> dict[str, float | None]:
    """The share of the full cache's accuracy, paired by text, with its interval."""
    seeds = sorted(own.keys() & full.keys())
    found = asdict(ratio([own[seed] for seed in seeds], [full[seed] for seed in seeds]))
    names = {"value": "of_full", "low": "of_full_low", "high": "of_full_high"}
    return {new: None if found[old] != found[old] else found[old] for old, new in names.items()}


def _asked(predictions: Sequence[dict[str, Any]]) -> int:
    """How many far answers texts have: who forgets a name no longer asks for it."""
    return sum(p["answers_far"] for p in predictions)


def _paired(ours: dict[int, float], theirs: dict[int, float]) -> dict[str, Any] | None:
    """None where the two did not answer the same prompts."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    return asdict(compare([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]))


def _mark_significant(found: Sequence[dict[str, Any]]) -> None:
    """Holm's correction over the servers that one table compares with the baseline."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        if row.get("against"):
            groups[row["exam"], row["budget"], row["protect"]].append(row["against"])
    for group in groups.values():
        for paired, hit in zip(group, holm([p["p_value"] for p in group]), strict=True):
            paired["significant"] = hit


def tables(found: Iterable[dict[str, Any]], baseline: str) -> str:
    """A Markdown table per exam, the best first under each budget and protection."""
    by_exam: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        by_exam[row["exam"]].append(row)
    parts = [
        f"Compared with `{baseline}`, paired by prompt and seed; `*`: p < 0.05 after Holm's "
        "correction over the servers of one exam, budget and protection.\n"
    ]
    for exam, group in sorted(by_exam.items()):
        group.sort(key=_order)
        parts += [f"## {exam}\n", HEADER, *map(_line, group), ""]
    return "\n".join(parts)


def summary(found: Sequence[dict[str, Any]], budget: int) -> str:
    """One Markdown table of a budget: servers down, exams across; shares of the full cache's
    accuracy. `*`: significantly different from the baseline; `?`: the texts ask for less than they
    would; `!`: nothing was evicted."""
    kept = [row for row in found if row["budget"] == budget]
    columns = list(dict.fromkeys((r["exam"], r["protect"]) for r in kept))
    several = len({protect for _, protect in columns}) > 1
    names = [f"{exam}, {protect}" if several else exam for exam, protect in columns]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(columns) + 1) + "|"]
    full = {row["exam"]: row["accuracy"] for row in found if row["budget"] is None}
    whole = [_shown(full.get(exam)) for exam, _ in columns]
    lines.append(f"| full cache: accuracy | {' | '.join(whole)} |")
    shares = {(r["server"], r["exam"], r["protect"]): _share(r) for r in kept}
    for server in dict.fromkeys(row["server"] for row in kept):
        cells = [shares.get((server, *column), "") for column in columns]
        lines.append(f"| {server} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summaries(found: Sequence[dict[str, Any]]) -> str:
    """The summary of every budget, the largest first, each under its heading."""
    budgets = sorted({row["budget"] for row in found if row["budget"]}, reverse=True)
    return "\n\n".join(f"Budget {budget}:\n\n{summary(found, budget)}" for budget in budgets)


def _share(row: dict[str, Any]) -> str:
    star = "*" if (row.get("against") or {}).get("significant") else ""
    few = "?" if (row.get("questions") or 1.0) < FEW_QUESTIONS else ""
    return _shown(row.get("of_full")) + star + few + ("" if row["evicted"] else "!")


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    full = row["budget"] is None
    return (not full, -(row["budget"] or 0), row["protect"], -row["accuracy"])


def _shown(value: float | None, digits: int = 3) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _interval(row: dict[str, Any]) -> str:
    if row.get("of_full") is None:
        return ""
    low, high = _shown(row["of_full_low"]), _shown(row["of_full_high"])
    return f"{_shown(row['of_full'])} ({low} to {high})"


def _line(row: dict[str, Any]) -> str:
    paired = row.get("against") or {}
    star = "*" if paired.get("significant") else ""
    evictions = str(row["evictions"])
    if row["budget"] is not None and not row["evicted"]:
        evictions = "**none: not comparable**"
    cells = [
        row["server"] if row["budget"] is not None else "full cache",
        str(row["budget"] or ""),
        row["protect"],
        f"{_shown(row['accuracy'])} ({_shown(row['low'])} to {_shown(row['high'])})",
        _interval(row),
        _shown(row["far"]),
        f"{row['answers_far']}",
        _shown(row["all_right"]),
        f"{paired['difference']:+.3f}{star}" if paired else "",
        _shown(paired.get("p_value"), 4),
        f"{paired['wins']}/{paired['ties']}/{paired['losses']}" if paired else "",
        f"{row['words_mean']:.0f}",
        _shown(row["loop_rate"], 2),
        f"{row['broken']}",
        evictions,
    ]
    if row["loss"] is not None:
        cells[3] += f", loss {row['loss']:.3f}"
    return "| " + " | ".join(cells) + " |"


def write(store: Store, baseline: str) -> list[Path]:
    """`report.md`, `report.json` and one plot per exam and protection; the files written."""
    found = rows(store, baseline)
    report, numbers = store.root / "report.md", store.root / "report.json"
    report.write_text(
        f"# {store.root.name}\n\n{summaries(found)}\n\nShares of the accuracy with the full cache; "
        "`*`: significantly different from the baseline, `?`: the texts have less than 70 % of "
        "the full cache's far answers, so that accuracy flatters; `!`: nothing was evicted.\n\n"
        + tables(found, baseline)
    )
    numbers.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return [report, numbers, *plots(store.root, found)]


def plots(out: Path, found: Sequence[dict[str, Any]]) -> list[Path]:
    """Accuracy against budget with intervals; cells without evictions are hollow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    kept = [row for row in found if row["budget"] is not None]
    for exam, protect in sorted({(row["exam"], row["protect"]) for row in kept}):
        figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
        group = [row for row in kept if (row["exam"], row["protect"]) == (exam, protect)]
        budgets = sorted({row["budget"] for row in group})
        labels = list(dict.fromkeys(row["server"] for row in group))
        for number, label in enumerate(labels):
            points = sorted((r for r in group if r["server"] == label), key=lambda r: r["budget"])
            # Side by side: intervals at the same budget would cover each other.
            shift = 1 + 0.012 * (number - len(labels) / 2)
            x = [row["budget"] * shift for row in points]
            y = [row["accuracy"] for row in points]
            errors = [
                [row["accuracy"] - row["low"] for row in points],
                [row["high"] - row["accuracy"] for row in points],
            ]
            axes.errorbar(
                x, y, yerr=errors, marker="os^vDPX*<>"[number % 10], capsize=2, linewidth=1.2,
                markersize=5, label=label, color=pyplot.get_cmap("tab20")(number % 20),
            )  # fmt: skip
            hollow = [i for i, row in enumerate(points) if not row["evicted"]]
            axes.plot([x[i] for i in hollow], [y[i] for i in hollow], "o", color="white", zorder=9)
        full = [row for row in found if row["exam"] == exam and row["budget"] is None]
        for row in full:
            axes.axhline(row["accuracy"], color="black", linestyle=":", linewidth=1)
            axes.text(budgets[0], row["accuracy"], "full cache", va="bottom", fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.minorticks_off()
        length = group[0]["length"]
        axes.set_xlabel(f"budget, tokens (of {length})")
        axes.set_ylabel("right answers")
        axes.set_title(f"{exam}, protect={protect}: accuracy against budget, 95 % intervals")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.grid(alpha=0.3)
        path = out / f"{exam}-{protect}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written
