# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""One long span in the prompt or early in the text, reproduced whole at midnight."""

from __future__ import annotations

import random
from dataclasses import dataclass

from gkv_vllm.eval.tasks import clock
from gkv_vllm.eval.tasks.base import Answer, Document, Grade
from gkv_vllm.eval.tasks.once import ANSWER_WEIGHT, POOL
from gkv_vllm.eval.vocabulary import END, MINUTES

LENGTHS = (5, 10, 20, 40)
"""Words of a span."""


@dataclass(frozen=True)
class Copyback:
    """`copyback 18h :20 :40 span C3 Ada's ... F1 ; | 18h :20 ... 00h :00 copy C3 Ada's ... F1 ;`

    The span has no word twice. Every word of the copy is an answer; one that is missing is wrong,
    and so are all of a text whose clock skips a minute."""

    name: str = "copyback"

    def draw(self, rng: random.Random, length: int) -> Document:
        symbols = rng.choice([n for n in LENGTHS if 2 * n + 12 <= length])
        # At one distance, a model learns the distance instead of what stands there. The larger of
        # two: far recalls are harder to learn.
        length = max(rng.randint(2 * symbols + 12, length) for _ in range(2))
        return self.compose(rng, length, symbols, in_prompt=rng.random() < 0.5)

    def compose(self, rng: random.Random, length: int, symbols: int, in_prompt: bool) -> Document:
        """A document of just under `length` words."""
        span = rng.sample(POOL, symbols)
        lines = max(0, (length - 2 * symbols - 12) // clock.LINE)
        document = Document()
        document.given("copyback", *clock.stamp(lines), MINUTES[symbols])
        if in_prompt:
            document.given("span", *span, ";")
        document.given("|")
        document.end_prompt()
        if not in_prompt:
            document.known("span")
            document.chosen(*span)
            document.known(";")
        for number in range(lines):
            clock.line(document, rng, lines - number, first=number == 0)
        document.answer(*clock.stamp(0), weight=clock.TURN_WEIGHT)
        document.known("copy")
        document.answer(*span, weight=ANSWER_WEIGHT)
        document.answer(";")
        document.known(END)
        return document

    def grade(self, words: list[str], prompt: int) -> Grade:
        first = words.index("span") + 1 if "span" in words else len(words)
        span: list[str] = []
        while first + len(span) < len(words) and words[first + len(span)] in POOL:
            span.append(words[first + len(span)])
        midnight, broken = clock.midnight(words, prompt), clock.broken_lines(words, prompt)
        answers = []
        for offset in range(MINUTES.index(words[3])):
            position = midnight + 3 + offset
            said = words[position] if position < len(words) else None
            right = broken == 0 and offset < len(span) and said == span[offset]
            answers.append(Answer(min(position, len(words)), midnight + 3 - first, right))
        return Grade(answers, broken)
