# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Exams: a task with its sizes fixed, as prompts to send and texts to grade; sends nothing.

Who forgets a fact no longer asks for it, when the text is its own: then forgetting flatters. So in
most exams a document decides what is asked, word by word, and the model what is answered:

- `answers`: the words of the document are written by the engine one after another, the answers by
  the model. A wrong answer stays in the text;
- `reads`: the answers are the document's too, and the model's are what it would have said there.
  Nothing follows from a wrong one, and the loss of the document is that under eviction;
- `writes`: all is the model's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from gkv_vllm.eval.tasks import TASKS, Answer, Document, Grade
from gkv_vllm.eval.tasks.copyback import Copyback
from gkv_vllm.eval.tasks.once import Once
from gkv_vllm.eval.vocabulary import OWNERS

SAMPLED = {"temperature": 1.0, "min_p": 0.05}
"""For texts in which the model chooses names and symbols: unlikely words are never drawn."""
GREEDY = {"temperature": 0.0}
Mode = Literal["answers", "reads", "writes"]

PROCESSOR = "gkv_vllm.eval.script:Script"
"""What a server needs as `--logits-processors`, for all but what the model writes alone."""
ARGUMENT = "script"
"""Of `vllm_xargs`: the token at each place of a text."""
OWN = -1
"""In the place of a token: the model's own choice."""


@dataclass(frozen=True)
class Question:
    """One request of an exam."""

    seed: int
    prompt: list[str]
    max_tokens: int
    sampling: dict[str, Any]
    document: tuple[str, ...] = ()
    """The words after the prompt, where a document decides them."""
    asked: tuple[Answer, ...] = ()
    """The document's answers, all right; their positions count the prompt."""

    @property
    def text(self) -> str:
        return " ".join(self.prompt)

    def owned(self, answer: Answer) -> range:
        """Where the words of an answer stand in what comes after the prompt."""
        end = answer.position - len(self.prompt) + 1
        return range(end - answer.words, end)

    @property
    def own(self) -> list[int]:
        """Where words of any answer stand in what comes after the prompt, in order."""
        return sorted({at for answer in self.asked for at in self.owned(answer)})


@dataclass(frozen=True)
class Exam:
    """Questions of one kind, as many as seeds; `length` words with the prompt."""

    name: str
    task: str
    compose: Callable[[random.Random, int], Document]
    mode: Mode
    sampling: dict[str, Any]

    def question(self, seed: int, length: int) -> Question:
        """The same for the same seed and length; different exams draw differently."""
        document = self.compose(random.Random(f"{self.name} {length} {seed}"), length)
        sampling = dict(self.sampling)
        if sampling["temperature"] > 0:
            sampling["seed"] = seed
        words, prompt = document.words[:length], document.prompt
        if self.mode == "writes":
            return Question(seed, words[:prompt], length - prompt, sampling)
        grade = TASKS[self.task].grade(words, prompt)
        asked = tuple(answer for answer in grade.answers if answer.right)
        after = tuple(words[prompt:])
        return Question(seed, words[:prompt], len(after), sampling, after, asked)

    def grade(self, question: Question, words: list[str]) -> Grade:
        """Grade the words that came after a question's prompt."""
        if self.mode == "writes":
            return TASKS[self.task].grade(question.prompt + words, len(question.prompt))
        answers = []
        for answer in question.asked:
            at = question.owned(answer)
            right = words[at.start : at.stop] == list(question.document[at.start : at.stop])
            answers.append(replace(answer, right=right))
        return Grade(answers, broken=0)


def _once(
    symbols: int, in_prompt: bool, decoys: bool = False
) -> Callable[[random.Random, int], Document]:
    def compose(rng: random.Random, length: int) -> Document:
        return Once().compose(rng, length, len(OWNERS), symbols, in_prompt, decoys)

    return compose


def _copyback(symbols: int, in_prompt: bool) -> Callable[[random.Random, int], Document]:
    def compose(rng: random.Random, length: int) -> Document:
        return Copyback().compose(rng, length, symbols, in_prompt)

    return compose


EXAMS = {
    exam.name: exam
    for exam in (
        Exam("ledger", "ledger", TASKS["ledger"].draw, "answers", GREEDY),
        Exam("once-3", "once", _once(3, in_prompt=False), "answers", GREEDY),
        Exam("once-10", "once", _once(10, in_prompt=False), "answers", GREEDY),
        Exam("once-3-decoys", "once", _once(3, False, decoys=True), "reads", GREEDY),
        Exam("once-10-decoys", "once", _once(10, False, decoys=True), "reads", GREEDY),
        Exam("once-3-prompt", "once", _once(3, in_prompt=True), "answers", GREEDY),
        Exam("once-10-prompt", "once", _once(10, in_prompt=True), "answers", GREEDY),
        Exam("copyback-40", "copyback", _copyback(40, in_prompt=False), "answers", GREEDY),
        Exam("copyback-40-prompt", "copyback", _copyback(40, in_prompt=True), "answers", GREEDY),
        Exam("trace", "trace", TASKS["trace"].draw, "reads", GREEDY),
        Exam("prose", "prose", TASKS["prose"].draw, "reads", GREEDY),
        Exam("ledger-free", "ledger", TASKS["ledger"].draw, "writes", SAMPLED),
        Exam("once-3-free", "once", _once(3, in_prompt=False), "writes", SAMPLED),
        Exam("trace-free", "trace", TASKS["trace"].draw, "writes", GREEDY),
    )
}
