# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""A log with a line for each minute up to midnight: what `once` and `copyback` pass time with."""

from __future__ import annotations

import random
from collections.abc import Sequence

from gkv_vllm.eval.tasks.base import Document
from gkv_vllm.eval.vocabulary import HOURS, MINUTES, PLACES, VERBS

LINE = 6
"""Words of a line: `17h :42 barn shines dock .`"""
DAY = 24 * 60


def stamp(minutes_left: int) -> tuple[str, str]:
    """Hour and minute, so many minutes before midnight."""
    now = (DAY - minutes_left) % DAY
    return HOURS[now // 60], MINUTES[now % 60]


TURN_WEIGHT = 2.0
"""Of the first stamp and of full hours: rare, but a text that misses one is lost."""


def line(
    document: Document,
    rng: random.Random,
    minutes_left: int,
    first: bool,
    decoys: Sequence[str] = (),
) -> None:
    """A minute in which nothing that matters happens; told in `decoys`, where there are any."""
    if first or minutes_left % 60 == 0:
        document.answer(*stamp(minutes_left), weight=TURN_WEIGHT)
    else:
        document.known(*stamp(minutes_left))
    pools = (decoys,) * 3 if decoys else (PLACES, VERBS, PLACES)
    document.free(*(rng.choice(pool) for pool in pools))
    document.known(".")


def broken_lines(words: list[str], prompt: int) -> int:
    """How many stamps of a text do not come when they should, from the prompt's first on.

    Up to midnight each must be a minute after the one before; the first is the prompt's."""
    due = HOURS.index(words[1]) * 60 + MINUTES.index(words[2])
    broken = 0
    for at in range(prompt, min(midnight(words, prompt) + 1, len(words) - 1)):
        if words[at] in HOURS and words[at + 1] in MINUTES:
            now = HOURS.index(words[at]) * 60 + MINUTES.index(words[at + 1])
            broken += now != due
            due = (now + 1) % DAY
    return broken


def midnight(words: list[str], start: int) -> int:
    """Where `00h :00` stands at or after `start`; the end of the text where it does not."""
    for at in range(start, len(words) - 1):
        if words[at] == HOURS[0] and words[at + 1] == MINUTES[0]:
            return at
    return len(words)
