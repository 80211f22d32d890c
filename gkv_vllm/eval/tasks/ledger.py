# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Facts that change: the prompt sets them, the text overwrites them and asks for the latest."""

from __future__ import annotations

import random

from gkv_vllm.eval.tasks.base import Answer, Document, Grade
from gkv_vllm.eval.vocabulary import ASKS, DIGITS, NAMES, SETS

WEIGHTS = (6,) * 6 + (3,) * 8 + (1,) * 12
"""How often each name is used: the last twelve come up once in two hundred words."""
SET_SHARE = 0.4


class Ledger:
    """`ledger a= 3 ; b= 7 ; | b? 7 ; a= 5 ; a? 5 ; ...`, statements without end.

    Every `x? v` is an answer: v must be the value that x was last given. Its age counts from where
    the value was last written, in a fact or an answer."""

    name = "ledger"

    def draw(self, rng: random.Random, length: int) -> Document:
        document, count = Document(), min(len(NAMES), max(4, length // 16))
        names = sorted(rng.sample(range(len(NAMES)), count))
        weights = [WEIGHTS[name] for name in names]
        values = {name: rng.choice(DIGITS) for name in names}
        document.given("ledger")
        for name in names:
            document.given(SETS[name], values[name], ";")
        document.given("|")
        document.end_prompt()
        while len(document.words) < length:
            name = rng.choices(names, weights)[0]
            if rng.random() < SET_SHARE:
                values[name] = rng.choice(DIGITS)
                document.free(SETS[name], values[name])
            else:
                document.free(ASKS[name])
                document.answer(values[name])
            document.known(";")
        return document

    def grade(self, words: list[str], prompt: int) -> Grade:
        values: dict[str, str] = {}
        seen: dict[str, int] = {}
        answers, broken = [], 0
        for at in range(1, len(words)):
            word, before = words[at], words[at - 1]
            if before in SETS and word in DIGITS:
                values[before[0]], seen[before[0]] = word, at
            elif before in ASKS:
                name = before[0]
                if name in values:
                    right = word == values[name]
                    answers.append(Answer(at, at - seen[name], right))
                    seen[name] = at if right else seen[name]
                else:
                    broken += 1
            elif at >= prompt:
                broken += _misplaced(word, before)
        return Grade([a for a in answers if a.position >= prompt], broken)


def _misplaced(word: str, before: str) -> bool:
    if before in DIGITS:
        return word != ";"
    return before not in (";", "|") or word not in SETS + ASKS
