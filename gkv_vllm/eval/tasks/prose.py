# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Plain sentences about the things of a few people: for loss, and for facts kept loosely."""

from __future__ import annotations

import random

from gkv_vllm.eval.tasks.base import Answer, Document, Grade
from gkv_vllm.eval.vocabulary import OF_PEOPLE, PLACES, THINGS, VERBS

CAST = 12
SCENES = 4
WEIGHTS = (8, 8, 6, 6, 4, 4, 2, 2, 1, 1, 1, 1)
"""How often each of the cast appears, in the order of their introduction."""


class Prose:
    """`prose Ada's lamp . Ben's coin . | Ben's coin rolls at the farm . Ada's ...`

    The prompt introduces the cast, each with a thing. A sentence names one of the cast, the
    person's thing (an answer), a verb and one of the story's few places (not graded, but a story
    that forgets its places has a higher loss)."""

    name = "prose"

    def draw(self, rng: random.Random, length: int) -> Document:
        count = min(CAST, max(6, length // 12))
        cast = rng.sample(OF_PEOPLE, count)
        things = dict(zip(cast, rng.sample(THINGS, count), strict=True))
        places = rng.sample(PLACES, SCENES)
        document = Document()
        document.given("prose")
        for person in cast:
            document.given(person, things[person], ".")
        document.given("|")
        document.end_prompt()
        while len(document.words) < length:
            person = rng.choices(cast, WEIGHTS[:count])[0]
            document.free(person)
            document.answer(things[person])
            document.free(rng.choice(VERBS))
            document.known("at", "the")
            document.free(rng.choice(places))
            document.known(".")
        return document

    def grade(self, words: list[str], prompt: int) -> Grade:
        things: dict[str, str] = {}
        seen: dict[str, int] = {}
        answers, broken = [], 0
        for at in range(1, len(words)):
            person, word = words[at - 1], words[at]
            if person not in OF_PEOPLE:
                continue
            if at < prompt:
                things[person], seen[person] = word, at
            elif person not in things:
                broken += 1
            else:
                right = word == things[person]
                answers.append(Answer(at, at - seen[person], right))
                seen[person] = at if right else seen[person]
        return Grade(answers, broken)
