# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The keep-map: layers and heads against positions, as a page with a slider or as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gkv_vllm.record import RecordError
from gkv_vllm.view.fates import Fates
from gkv_vllm.view.page import pack, page

STATES = ("not computed", "evicted before", "evicted now", "kept", "protected", "recent")
"""What a head can have done with a token, by number."""
COLOURS = ("#ffffff", "#e4e4e4", "#d95f02", "#3b6fb6", "#1b9e77", "#8c86b8")


def label(fates: Fates) -> str:
    """What tells one record from another."""
    header = fates.record.header
    form = f"{header.granularity}, {header.scope}" if header.granularity == "token" else "block"
    return f"{header.policy} ({form}, budget {header.budget}): {header.request_id}"


def about(fates: Fates) -> dict[str, Any]:
    """What every page says of a request."""
    record, header = fates.record, fates.record.header
    names = ("request_id", "policy", "granularity", "scope", "protect", "budget", "interval")
    return {
        "label": label(fates),
        **{name: getattr(header, name) for name in (*names, "block_size", "layers", "kv_heads")},
        "tokens": fates.tokens,
        "prompt_tokens": record.prompt_tokens,
        "finish": record.finish,
        "truncated": record.truncated,
        "preemptions": record.preemptions,
        "events": fates.events,
        "left": pack(fates.left),
    }


def html(all_fates: Sequence[Fates]) -> str:
    """One page for these records, one of which shows at a time."""
    return page("keepmap", "Keep-map", {"records": [about(fates) for fates in all_fates]})


def states(fates: Fates, event: int) -> np.ndarray:
    """What each head had done with each token right after an event: [heads, tokens], of STATES."""
    numbers, place = fates.events[event], np.arange(fates.tokens)
    left = fates.left[numbers["epoch"]]
    shown = np.where(left < event, 1, np.where(left == event, 2, 3))
    shown[:, place < numbers["protected"]] = 4
    shown[:, place >= numbers["recent"]] = 5
    shown[:, place >= numbers["num_tokens"]] = 0
    return shown


def png(all_fates: Sequence[Fates], path: Path, event: int | None) -> None:
    """One panel for each record, after an event: the last one unless said."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    height = 1.2 + sum(0.9 + 0.05 * fates.heads for fates in all_fates)
    figure, axes = plt.subplots(
        len(all_fates), 1, figsize=(11, height), squeeze=False, layout="constrained"
    )
    for axis, fates in zip(axes[:, 0], all_fates, strict=True):
        index = _chosen(fates, event)
        header, numbers = fates.record.header, fates.events[index]
        shown = states(fates, index)[:, : numbers["num_tokens"]]
        colours = ListedColormap(COLOURS)
        axis.imshow(
            shown, cmap=colours, vmin=0, vmax=5, aspect="auto", interpolation="none",
            extent=(0, shown.shape[1], fates.heads, 0),
        )  # fmt: skip
        axis.set_yticks(
            np.arange(0, fates.heads, header.kv_heads), labels=range(header.layers), va="top"
        )
        axis.hlines(np.arange(0, fates.heads, header.kv_heads), *axis.get_xlim(), "white", lw=0.6)
        axis.axvline(fates.record.prompt_tokens, color="black", lw=0.8, ls="--")
        axis.set_ylabel("layer (its KV heads)")
        axis.set_title(
            f"{label(fates)}\nevent {index + 1} of {len(fates.events)}, "
            f"{numbers['num_tokens']:,} tokens computed",
            fontsize=9, loc="left",
        )  # fmt: skip
    axes[-1, 0].set_xlabel("position (dashed: end of the prompt)")
    patches = [Patch(color=c, label=s) for c, s in zip(COLOURS[1:], STATES[1:], strict=True)]
    figure.legend(handles=patches, ncols=5, loc="outside lower center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _chosen(fates: Fates, event: int | None) -> int:
    count = len(fates.events)
    if not count:
        raise RecordError(f"{fates.record.path} has no event: nothing was evicted")
    if event is None:
        return count - 1
    if not 1 <= event <= count:
        raise RecordError(f"{fates.record.path} has events 1 to {count}, and not {event}")
    return event - 1
