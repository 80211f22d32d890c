# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Plain sentences about a few people and what is theirs: for loss, and for facts kept loosely."""

from __future__ import annotations

import random

from gkv_vllm.eval.tasks.base import Answer, Document, Grade
from gkv_vllm.eval.vocabulary import PEOPLE, PLACES, THINGS, VERBS

CAST = 12
SCENES = 4
WEIGHTS = (8, 8, 6, 6, 4, 4, 2, 2, 1, 1, 1, 1)
"""How often each of the cast appears, in the order of their introduction."""


class Prose:
    """`prose Ada lamp . Ben coin . | Ben sells the coin at farm . Ada ...`

    The prompt introduces the cast, each with a thing. A sentence names one of the cast, a verb,
    the person's thing (an answer) and one of the story's few places (not graded, but a story that
    forgets its places has a higher loss)."""

    name = "prose"

    def draw(self, rng: random.Random, length: int) -> Document:
        count = min(CAST, max(3, length // 20))
        cast = rng.sample(PEOPLE, count)
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
            document.free(person, rng.choice(VERBS))
            document.known("the")
            document.answer(things[person])
            document.known("at")
            document.free(rng.choice(places))
            document.known(".")
        return document

    def grade(self, words: list[str], prompt: int) -> Grade:
        things = {
            a: b for a, b in zip(words[:prompt], words[1:prompt], strict=False) if a in PEOPLE
        }
        seen = {word: at for at, word in enumerate(words[:prompt]) if word in THINGS}
        answers, broken = [], 0
        for at in range(prompt + 3, len(words)):
            if words[at - 1] != "the":
                continue
            thing = things.get(words[at - 3])
            if thing is None:
                broken += 1
                continue
            answers.append(Answer(at, at - seen[thing], words[at] == thing))
            if words[at] == thing:
                seen[thing] = at
        return Grade(answers, broken)
