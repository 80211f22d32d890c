# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Compares what was written after an eviction, and renders the report; compares no kept sets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any


def same_text(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """How far texts (`tokens`, `logprobs`; the second one's `margins`) go together.

    `margins_where_they_part`: by how much the second one's model preferred its token to the next
    best, in logits, where the two part."""
    same, apart, margins, agreed = 0, 0.0, [], 0
    for mine, other in pairs:
        steps = list(zip(mine["tokens"], other["tokens"], strict=True))
        first = next((i for i, (a, b) in enumerate(steps) if a != b), len(steps))
        same += first == len(steps)
        agreed += first
        for i in range(first):
            apart = max(apart, abs(mine["logprobs"][i] - other["logprobs"][i]))
        if first < len(steps):
            margins.append(other["margins"][first])
    return {
        "texts": len(pairs),
        "same": same,
        "tokens_before_they_part": agreed,
        "logprob_difference": apart,
        "margins_where_they_part": sorted(margins),
    }


def to_json(found: dict[str, Any]) -> str:
    """As JSON, a list of numbers on one line."""
    numbers = re.compile(r"\[\s+([-+\d.e,\s]+?)\s+\]")
    spread = json.dumps(found, indent=1)
    return numbers.sub(lambda list_: "[" + " ".join(list_[1].split()) + "]", spread) + "\n"


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| policy | by | tokens, kept | who competes | equal sets | Jaccard, mean (least) "
        "| scores apart | disagreements | texts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        agreement = row["agreement"]
        causes = {k: n for k, n in agreement["causes"].items() if n and k != "none"}
        apart = agreement["score_difference"]
        texts = row["continuations"] and row["continuations"]["evicted"]
        cells = (
            f"`{row['policy']}`",
            row["where"],
            f"{row['tokens']}, {' and '.join(map(str, row['kept']))}",
            row["note"],
            f"{round(agreement['equal'] * agreement['heads'])} of {agreement['heads']}",
            f"{agreement['jaccard_mean']:.4f} ({agreement['jaccard_least']:.3f})",
            "" if apart is None else f"{apart:.1e}",
            ", ".join(f"{n} {cause}" for cause, n in causes.items()) or "none",
            f"{texts['same']} of {texts['texts']} the same" if texts else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
