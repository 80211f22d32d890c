# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The model in the repository: small, right, and as its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gkv_vllm.eval.accuracy import accuracy, table
from gkv_vllm.eval.tasks import TASKS

MODEL = Path(__file__).parents[2] / "models" / "reasoner"
TRAINED = 2304
EVALUATED = 1536


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_it_is_small():
    assert sum(path.stat().st_size for path in MODEL.glob("*.safetensors")) < 12_000_000


@pytest.mark.parametrize("task", TASKS)
def test_it_answers_with_its_whole_cache(model, task):
    """At the length of the evaluation; 0.98 and not 0.99, since four documents are few."""
    assert accuracy(model, task, EVALUATED, 4)["accuracy"] >= 0.98


def test_the_committed_accuracies_reach_what_is_said_of_them():
    found = json.loads((MODEL / "accuracy.json").read_text())
    assert set(found) == set(TASKS)
    upto = [str(n) for n in (256, 512, 1024, EVALUATED, 2048)]
    assert min(found[task][n]["accuracy"] for task in TASKS for n in upto) >= 0.99
    below = [task for task in TASKS if found[task][str(TRAINED)]["accuracy"] < 0.99]
    assert below == ["copyback"]  # the card says so


def test_the_card_shows_the_committed_accuracies():
    found = json.loads((MODEL / "accuracy.json").read_text())
    card = (MODEL / "README.md").read_text()
    shown = card.split("<!-- begin accuracy -->\n")[1].split("\n<!-- end accuracy -->")[0]
    assert shown == table(found, TRAINED)


def test_the_log_ends_at_the_trained_length():
    lines = [json.loads(line) for line in (MODEL / "training.jsonl").read_text().splitlines()]
    assert lines[-1]["length"] == TRAINED
    # Steps after the last checkpoint were done again when it was resumed.
    assert lines[-1]["step"] == max(line["step"] for line in lines)
