# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Accuracy with the whole cache: counted where answers are predicted, by a model made to order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gkv_vllm.eval.accuracy import accuracy, table
from gkv_vllm.eval.tasks import TASKS
from gkv_vllm.eval.vocabulary import SIZE


class Oracle:
    """Says the next word of what it is given, or, from a position on, always the padding."""

    device = "cpu"

    def __init__(self, until: int) -> None:
        self.until = until

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        said = torch.roll(input_ids, -1, dims=1)
        said[:, self.until :] = 0
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, SIZE).float())


@pytest.mark.parametrize("task", TASKS)
def test_who_knows_the_next_word_is_always_right(task):
    found = accuracy(Oracle(10_000), task, 512, 3)
    assert found["accuracy"] == 1.0 and found["answers"] > 10


@pytest.mark.parametrize("task", TASKS)
def test_who_knows_nothing_is_never_right(task):
    assert accuracy(Oracle(0), task, 512, 3)["accuracy"] == 0.0


def test_an_answer_is_predicted_from_the_word_before_it():
    found = accuracy(Oracle(400), "ledger", 512, 2)
    assert 0.5 < found["accuracy"] < 0.9


def test_lengths_beyond_training_are_marked():
    found = {"ledger": {str(n): accuracy(Oracle(9999), "ledger", n, 1) for n in (256, 1024)}}
    head, _, row = table(found, trained=512).splitlines()
    assert head == "| task | 256 | 1024 (beyond) |"
    assert "1.0000, far 1.000" in row
