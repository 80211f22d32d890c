# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Draws recall.json: accuracy of all and of far answers per policy, one mark for each form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.recall import settings

# Okabe and Ito's palette; the marks differ in shape as well.
INK, GREY = "#222222", "#777777"
MARKS = {
    "token/head": ("#0072B2", "o"),
    "token/layer": ("#56B4E9", "D"),
    "token/all": ("#009E73", "s"),
    "block": ("#D55E00", "^"),
}
OFFSETS = dict(zip(MARKS, (-0.24, -0.08, 0.08, 0.24), strict=True))


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from benchmarks.recall import report

    stats = report.Bootstrap(result)
    groups = report.grouped(report.rows_of(result, "policies", "models"))
    with pyplot.rc_context({"font.size": 10, "axes.edgecolor": GREY, "text.color": INK}):
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 5.2), sharey=True, layout="constrained")
        for axes, (what, title) in zip(
            panels,
            (("right", "All answers"), ("far_right", f"Last seen over {settings.FAR} tokens ago")),
            strict=True,
        ):
            _panel(axes, stats, groups, what)
            axes.set_title(title, loc="left")
        models = len(groups["gkv", "token/head", settings.BUDGET])
        figure.suptitle(
            f"Recall at budget {settings.BUDGET} of {settings.LENGTH} tokens, mean of {models} "
            "small model(s); 95 % intervals over streams",
            x=0.01,
            ha="left",
            fontsize=10,
        )
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(MARKS) + 1,
            frameon=False,
        )
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _panel(axes: Any, stats: Any, groups: dict[Any, Any], what: str) -> None:
    policies = list(settings.POLICIES)
    full = [group for (label, *_), group in groups.items() if label == "full"]
    axes.axvline(stats.accuracy(full[0], what)[0], color=INK, linestyle=":", label="full cache")
    for form, (colour, mark) in MARKS.items():
        places, values, errors = [], [], []
        for place, label in enumerate(policies):
            group = groups.get((label, form, settings.BUDGET))
            if group is not None:
                value, low, high = stats.interval(group, what)
                places.append(place + OFFSETS[form])
                values.append(value)
                errors.append((value - low, high - value))
        axes.errorbar(
            values,
            places,
            xerr=list(zip(*errors, strict=True)),
            fmt=mark,
            color=colour,
            markersize=5,
            linewidth=1,
            label=form,
        )
    axes.set_yticks(range(len(policies)), policies)
    axes.set_ylim(len(policies) - 0.5, -0.5)
    axes.set_xlim(right=1)
    axes.set_xlabel("accuracy")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
