# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Writes the prompts of the lm-evaluation-harness tasks beside itself; drawn, not downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from gkv_vllm.eval.tasks import Document
from gkv_vllm.eval.tasks.copyback import Copyback
from gkv_vllm.eval.tasks.once import Once

PROMPTS = 16
LENGTH = 480
"""Words of a whole text, about."""


def draw(task: str, rng: random.Random) -> Document:
    if task == "copyback":
        return Copyback().compose(rng, LENGTH, symbols=20, in_prompt=True)
    return Once().compose(rng, LENGTH, owners=2, symbols=5, in_prompt=False)


def documents(task: str) -> list[dict[str, Any]]:
    """The prompts of one task, each with the right continuation that it was drawn with."""
    rng = random.Random(f"lm-evaluation-harness {task}")
    drawn = [draw(task, rng) for _ in range(PROMPTS)]
    return [
        {
            "task": task,
            "prompt": " ".join(document.words[: document.prompt]),
            "answer": " ".join(document.words[document.prompt :]),
        }
        for document in drawn
    ]


def main() -> None:
    for task in ("copyback", "once"):
        lines = [json.dumps(document) + "\n" for document in documents(task)]
        Path(__file__).with_name(f"{task}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
