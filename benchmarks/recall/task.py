# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Draws streams of facts, overwrites and questions as token ids; knows nothing of models.

A stream is BOS and statements of three tokens: a fact `A 7 ;` gives a name a value, possibly a new
one, and a question `a 7 ;` asks for it, the value in it being the answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES, VALUES = 20, 10
BOS, END = 0, 1
FIRST_VALUE = 2
FIRST_FACT = FIRST_VALUE + VALUES
FIRST_QUESTION = FIRST_FACT + NAMES
VOCABULARY = 64  # FIRST_QUESTION + NAMES, rounded up: vLLM pads to a multiple of 64 anyway
FACT_SHARE = 0.4


@dataclass(frozen=True)
class Answer:
    position: int
    """Where in the stream the answer stands; it is predicted from the token before."""
    age: int
    """Tokens since the value of this name was last seen, in a fact or in an answer."""


@dataclass(frozen=True)
class Stream:
    tokens: list[int]
    answers: list[Answer]


def draw(rng: random.Random, length: int, names: int = NAMES) -> Stream:
    """A stream of at least `length` tokens, cut to that length."""
    tokens, answers = [BOS], []
    values: dict[int, int] = {}
    seen: dict[int, int] = {}
    while len(tokens) < length:
        is_fact = not values or rng.random() < FACT_SHARE
        if is_fact:
            name = rng.randrange(names)
            values[name] = rng.randrange(VALUES)
        else:
            name = rng.choice(list(values))
            answers.append(Answer(len(tokens) + 1, len(tokens) + 1 - seen[name]))
        seen[name] = len(tokens) + 1
        first = FIRST_FACT if is_fact else FIRST_QUESTION
        tokens += [first + name, FIRST_VALUE + values[name], END]
    return Stream(tokens[:length], [answer for answer in answers if answer.position < length])
