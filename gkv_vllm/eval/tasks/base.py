# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What a task is: it draws documents to learn from, prompts to ask with, and grades what came."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Protocol


@dataclass
class Document:
    """A prompt and its right continuation, word by word."""

    words: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    """What a wrong prediction of each word costs in training."""
    prompt: int = 0
    """How many of the words are the prompt."""

    def free(self, *words: str) -> None:
        """Words that nobody can know: names, digits, symbols that the writer chose."""
        self._add(words, 0.1)

    def chosen(self, *words: str) -> None:
        """Words that the writer chose among those not yet used: which are left can be known."""
        self._add(words, 0.3)

    def known(self, *words: str) -> None:
        """Words that follow from what is written right before them."""
        self._add(words, 0.3)

    def answer(self, *words: str, weight: float = 1.0) -> None:
        """Words that need something far back."""
        self._add(words, weight)

    def given(self, *words: str) -> None:
        """Words of the prompt."""
        self._add(words, 0.05)

    def end_prompt(self) -> None:
        self.prompt = len(self.words)

    def _add(self, words: tuple[str, ...], weight: float) -> None:
        self.words += words
        self.weights += [weight] * len(words)


@dataclass(frozen=True)
class Answer:
    """A word of a text, or two, that something said before decides."""

    position: int
    """Index of its last word among all words, the prompt's included."""
    age: int
    """Words since what decides it was last written."""
    right: bool
    words: int = 1


@dataclass(frozen=True)
class Grade:
    """What was right in one text."""

    answers: list[Answer]
    broken: int
    """Words that no right text could have at their place, answers aside."""

    @property
    def accuracy(self) -> float:
        """Share of right answers; 0 for a text without any."""
        return sum(a.right for a in self.answers) / len(self.answers) if self.answers else 0.0

    @property
    def all_right(self) -> bool:
        return bool(self.answers) and all(a.right for a in self.answers)


class Task(Protocol):
    """One kind of document. All randomness comes from the `rng` that is handed in."""

    @property
    def name(self) -> str:
        """What the document begins with."""

    def draw(self, rng: random.Random, length: int) -> Document:
        """A document of about `length` words; longer ones may be cut."""

    def grade(self, words: list[str], prompt: int) -> Grade:
        """Grade a text whose first `prompt` words were given, by its own earlier words."""
