# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Passcodes stated once, early, and recalled at midnight after hundreds of unrelated lines."""

from __future__ import annotations

import random
from dataclasses import dataclass

from gkv_vllm.eval.tasks import clock
from gkv_vllm.eval.tasks.base import Answer, Document, Grade
from gkv_vllm.eval.vocabulary import END, MINUTES, OF_PEOPLE, OWNERS, SYMBOLS, THINGS

ANSWER_WEIGHT = 4.0


POOL = SYMBOLS + OF_PEOPLE + THINGS
LENGTHS = (3, 5, 10)
"""Symbols of a passcode."""


@dataclass(frozen=True)
class Once:
    """`once 18h :20 :03 #beta | code #alpha C3 A7 F1 ; ... 00h :00 recall #alpha C3 A7 F1 ; ...`

    The first lines state one passcode each (or the prompt states them all), `:03` symbols long, up
    to the owner that the prompt names. No symbol occurs in two places. Each symbol of a recall is
    an answer; one that is missing is wrong, and so are all of a text whose clock skips a minute."""

    name: str = "once"

    def draw(self, rng: random.Random, length: int) -> Document:
        # At one distance, a model learns the distance instead of what stands there. The larger of
        # two: far recalls are harder to learn.
        length = max(rng.randint(min(length, 60), length) for _ in range(2))
        fitting = [n for n in LENGTHS if 2 * (n + 3) + 40 <= length] or LENGTHS[:1]
        symbols = rng.choice(fitting)
        most = max(1, min(len(OWNERS), (length - 30) // (2 * (symbols + 3))))
        owners = most if rng.random() < 0.5 else rng.randint(1, most)
        return self.compose(rng, length, owners, symbols, in_prompt=rng.random() < 0.3)

    def compose(
        self,
        rng: random.Random,
        length: int,
        owners: int,
        symbols: int,
        in_prompt: bool,
        decoys: bool = False,
    ) -> Document:
        """A document of just under `length` words.

        `decoys`: the lines between are told in the symbols, names and things that no passcode has,
        so that these alone do not stand out."""
        drawn = rng.sample(SYMBOLS, owners * symbols)
        others = tuple(word for word in POOL if word not in drawn) if decoys else ()
        codes = [drawn[n * symbols : (n + 1) * symbols] for n in range(owners)]
        cost = 2 * owners * (symbols + 3) + 9
        lines = max(owners, (length - cost) // clock.LINE)
        document = Document()
        document.given("once", *clock.stamp(lines), MINUTES[symbols], OWNERS[owners - 1])
        if in_prompt:
            for owner, code in zip(OWNERS, codes, strict=False):
                document.given("code", owner, *code, ";")
        document.given("|")
        document.end_prompt()
        for number in range(lines):
            if number < owners and not in_prompt:
                document.known("code", OWNERS[number])
                document.chosen(*codes[number])
                document.known(";")
            clock.line(document, rng, lines - number, first=number == 0, decoys=others)
        document.answer(*clock.stamp(0), weight=clock.TURN_WEIGHT)
        for owner, code in zip(OWNERS, codes, strict=False):
            document.known("recall", owner)
            document.answer(*code, weight=ANSWER_WEIGHT)
            document.answer(";")
        document.known(END)
        return document

    def grade(self, words: list[str], prompt: int) -> Grade:
        symbols, owners = MINUTES.index(words[3]), OWNERS[: OWNERS.index(words[4]) + 1]
        codes, places, repeated = _stated(words)
        midnight, broken = clock.midnight(words, prompt), clock.broken_lines(words, prompt)
        recalled, confused = _recalled(words, midnight + 2)
        answers = []
        for owner in owners:
            code, first = codes.get(owner, []), recalled.get(owner, len(words))
            for offset in range(symbols):
                position = first + offset
                said = words[position] if position < len(words) else None
                # Who skips minutes recalls too early: that proves nothing.
                right = broken == 0 and offset < len(code) and said == code[offset]
                age = position - places[owner] - offset if owner in places else position
                answers.append(Answer(min(position, len(words)), age, right))
        return Grade(answers, broken + repeated + confused)


def _recalled(words: list[str], start: int) -> tuple[dict[str, int], int]:
    """Where the first symbol of each owner's recall stands, and how many recalls make no sense."""
    recalled: dict[str, int] = {}
    confused = 0
    for at in range(start, len(words) - 1):
        if words[at] == "recall":
            owner = words[at + 1]
            confused += owner not in OWNERS or owner in recalled
            recalled.setdefault(owner, at + 2)
    return recalled, confused


def _stated(words: list[str]) -> tuple[dict[str, list[str]], dict[str, int], int]:
    """Passcode and place of its first symbol by owner, and how many were stated again."""
    codes: dict[str, list[str]] = {}
    places: dict[str, int] = {}
    repeated = 0
    for at, word in enumerate(words[:-1]):
        if word == "code":
            owner = words[at + 1]
            code: list[str] = []
            while at + 2 + len(code) < len(words) and words[at + 2 + len(code)] in SYMBOLS:
                code.append(words[at + 2 + len(code)])
            if owner in codes or owner not in OWNERS:
                repeated += 1
            else:
                codes[owner], places[owner] = code, at + 2
    return codes, places, repeated
