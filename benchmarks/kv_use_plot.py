# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Draws KV blocks in use over time, stock against policy, from what bench_cpu.py measured.

`python benchmarks/kv_use_plot.py bench.json` draws an old measurement again.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

# Okabe and Ito's palette; the lines also differ in width and have their names beside them.
INK, STOCK_COLOUR, POOL_COLOUR = "#222222", "#D55E00", "#777777"
POLICY_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Left: blocks in use when there are enough. Right: requests running when there are not."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    policies = numbers["settings"]["policies"]
    cases = numbers["cases"]
    with pyplot.rc_context({"font.size": 10, "axes.edgecolor": POOL_COLOUR, "text.color": INK}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 5), layout="constrained")
        _panel(left, cases["ample"], policies, "blocks", "KV blocks in use")
        left.set_title(f"Ample pool ({cases['ample']['pool_blocks']:,} blocks)", loc="left")
        _panel(right, cases["memory-bound"], policies, "running", "requests running together")
        right.set_title(f"Small pool ({cases['memory-bound']['pool_blocks']:,} blocks)", loc="left")
        figure.suptitle(_title(numbers), x=0.01, ha="left", fontsize=10)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _panel(axes: Any, case: dict[str, Any], policies: list[str], what: str, label: str) -> None:
    sides = [("stock", STOCK_COLOUR, 1.5, "stock vLLM")]
    sides += [
        (p, c, 1.8, p) for p, c in zip(policies, itertools.cycle(POLICY_COLOURS), strict=False)
    ]
    for side, colour, width, name in sides:
        cells = case["sides"][side]
        lines = cells["series_of_first_round"]
        speed = f"{name}, {cells['tokens_per_second']:,.0f} tok/s"
        axes.plot(lines["seconds"], lines[what], color=colour, linewidth=width, label=speed)
    axes.set_xlabel("seconds")
    axes.set_ylabel(label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _title(numbers: dict[str, Any]) -> str:
    asked, machine = numbers["settings"], numbers["machine"]
    return (
        f"{asked['requests']} requests x {asked['tokens']:,} tokens, budget {asked['budget']}, "
        f"interval {asked['interval']}, blocks of {asked['block_size']} tokens; demo model on "
        f"{machine['cores']} cores"
    )


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_name("kv_use.png"))
