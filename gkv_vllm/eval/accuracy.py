# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Accuracy of a model with its whole cache, by task and length; no server, no policy.

`python -m gkv_vllm.eval.accuracy MODEL` lets transformers read right documents and counts where the
model says the right answer next. It writes MODEL/accuracy.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from gkv_vllm.eval.tasks import TASKS, Document, once
from gkv_vllm.eval.tasks.copyback import Copyback
from gkv_vllm.eval.tasks.once import Once
from gkv_vllm.eval.vocabulary import OWNERS, encode

FIRST_SEED = 1_000_000
"""Documents that training never drew: it draws from one stream of its own seed."""
LENGTHS = (256, 512, 1024, 1536, 2048, 2304, 3072, 4096)
FAR = 256


def full_length(task: str, rng: random.Random, length: int) -> Document:
    """A document of the length itself; in training those of two tasks are up to that length."""
    if task == "once":
        return Once().compose(
            rng, length, len(OWNERS), rng.choice(once.LENGTHS), rng.random() < 0.5
        )
    if task == "copyback":
        return Copyback().compose(rng, length, rng.choice((10, 20, 40)), rng.random() < 0.5)
    return TASKS[task].draw(rng, length)


@torch.inference_mode()
def accuracy(model: Any, task: str, length: int, documents: int) -> dict[str, Any]:
    """Right answers, all and far ones, over documents of one task and length."""
    right = answers = right_far = answers_far = 0
    for seed in range(FIRST_SEED, FIRST_SEED + documents):
        document = full_length(task, random.Random(f"{task} {length} {seed}"), length)
        words = document.words[:length]
        tokens = torch.tensor([encode(words)], device=model.device)
        said = model(input_ids=tokens).logits[0].argmax(-1).tolist()
        for answer in TASKS[task].grade(words, document.prompt).answers:
            if answer.position >= len(words):
                continue
            hit = said[answer.position - 1] == tokens[0, answer.position].item()
            right, answers = right + hit, answers + 1
            if answer.age > FAR:
                right_far, answers_far = right_far + hit, answers_far + 1
    return {
        "answers": answers,
        "accuracy": round(right / answers, 5) if answers else None,
        "answers_far": answers_far,
        "accuracy_far": round(right_far / answers_far, 5) if answers_far else None,
    }


def table(found: dict[str, dict[str, Any]], trained: int) -> str:
    """Markdown: a row per task, a column per length; those beyond training are marked."""
    lengths = [int(length) for length in next(iter(found.values()))]
    head = [f"{n}{'' if n <= trained else ' (beyond)'}" for n in lengths]
    lines = [
        f"| task | {' | '.join(head)} |",
        "|---" * (len(head) + 1) + "|",
    ]
    for task, by_length in found.items():
        cells = []
        for number in by_length.values():
            far = "" if number["accuracy_far"] is None else f", far {number['accuracy_far']:.3f}"
            cells.append(f"{number['accuracy']:.4f}{far}")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    from rich.progress import track
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(prog="python -m gkv_vllm.eval.accuracy", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--documents", type=int, default=16, help="of each task and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    model.eval()
    log = args.model / "training.jsonl"
    trained = json.loads(log.read_text().splitlines()[-1])["length"] if log.exists() else 0
    found: dict[str, dict[str, Any]] = {task: {} for task in TASKS}
    for task, length in track([(t, n) for t in TASKS for n in args.lengths], "Accuracy"):
        found[task][str(length)] = accuracy(model, task, length, args.documents)
    (args.model / "accuracy.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found, trained))


if __name__ == "__main__":
    main()
