# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""How plots of GPU benchmarks look; what they show stands with each benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kv_use_plot import INK, POLICY_COLOURS, POOL_COLOUR, STOCK_COLOUR

STOCK, POLICY = STOCK_COLOUR, POLICY_COLOURS[0]


def colours(count: int) -> list[Any]:
    """So many that can be told apart, up to 20."""
    from matplotlib import colormaps

    few = (*POLICY_COLOURS, STOCK_COLOUR, POOL_COLOUR)
    return list(few[:count]) if count <= len(few) else list(colormaps["tab20"].colors[:count])


def title(numbers: dict[str, Any]) -> str:
    """The device and the commit, and whether this was only a smoke run."""
    about = numbers["machine"]
    smoke = ", a smoke run: its numbers mean nothing" if numbers["quick"] else ""
    return f"{about['device']}, commit {about['commit']}{smoke}"


@contextmanager
def figure(path: Path, heading: str, panels: int, rows: int = 1) -> Iterator[list[Any]]:
    """Axes to draw on, side by side; saved when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 9, "axes.edgecolor": POOL_COLOUR, "text.color": INK}
    with pyplot.rc_context(style):
        drawn, grid = pyplot.subplots(
            rows, panels, figsize=(5 * panels, 4.5 * rows), layout="constrained", squeeze=False
        )
        axes = list(grid.flat)
        for one in axes:
            one.grid(axis="y", color="#dddddd", linewidth=0.6)
            one.spines[["top", "right"]].set_visible(False)
        yield axes
        drawn.suptitle(heading, x=0.01, ha="left", fontsize=9)
        drawn.savefig(path, dpi=150)
        pyplot.close(drawn)


def legend(axes: Any, columns: int) -> None:
    """Below everything, once for all panels."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns)
