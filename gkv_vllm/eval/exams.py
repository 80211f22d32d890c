# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Exams: a task with its sizes fixed, as prompts to send and texts to grade; sends nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gkv_vllm.eval.tasks import TASKS, Document, Grade
from gkv_vllm.eval.tasks.copyback import Copyback
from gkv_vllm.eval.tasks.once import Once
from gkv_vllm.eval.vocabulary import OWNERS

SAMPLED = {"temperature": 1.0, "min_p": 0.05}
"""For texts in which the model chooses names and symbols: unlikely words are never drawn."""
GREEDY = {"temperature": 0.0}


@dataclass(frozen=True)
class Question:
    """One request of an exam."""

    seed: int
    prompt: list[str]
    max_tokens: int
    sampling: dict[str, Any]

    @property
    def text(self) -> str:
        return " ".join(self.prompt)


@dataclass(frozen=True)
class Exam:
    """Questions of one kind, as many as seeds; `length` words with the prompt."""

    name: str
    task: str
    compose: Callable[[random.Random, int], Document]
    sampling: dict[str, Any]

    def question(self, seed: int, length: int) -> Question:
        """The same for the same seed and length; different exams draw differently."""
        document = self.compose(random.Random(f"{self.name} {length} {seed}"), length)
        sampling = dict(self.sampling)
        if sampling["temperature"] > 0:
            sampling["seed"] = seed
        prompt = document.words[: document.prompt]
        return Question(seed, prompt, length - len(prompt), sampling)

    def grade(self, question: Question, words: list[str]) -> Grade:
        """Grade the words that were generated for a question."""
        return TASKS[self.task].grade(question.prompt + words, len(question.prompt))


def _once(symbols: int, in_prompt: bool) -> Callable[[random.Random, int], Document]:
    def compose(rng: random.Random, length: int) -> Document:
        return Once().compose(rng, length, len(OWNERS), symbols, in_prompt)

    return compose


def _copyback(symbols: int, in_prompt: bool) -> Callable[[random.Random, int], Document]:
    def compose(rng: random.Random, length: int) -> Document:
        return Copyback().compose(rng, length, symbols, in_prompt)

    return compose


EXAMS = {
    exam.name: exam
    for exam in (
        Exam("ledger", "ledger", TASKS["ledger"].draw, SAMPLED),
        Exam("once-3", "once", _once(3, in_prompt=False), SAMPLED),
        Exam("once-10", "once", _once(10, in_prompt=False), SAMPLED),
        Exam("once-3-prompt", "once", _once(3, in_prompt=True), SAMPLED),
        Exam("once-10-prompt", "once", _once(10, in_prompt=True), SAMPLED),
        Exam("trace", "trace", TASKS["trace"].draw, GREEDY),
        Exam("copyback-40", "copyback", _copyback(40, in_prompt=False), SAMPLED),
        Exam("copyback-40-prompt", "copyback", _copyback(40, in_prompt=True), SAMPLED),
        Exam("prose", "prose", TASKS["prose"].draw, SAMPLED),
    )
}
