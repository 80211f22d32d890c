# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Which policies meet which presses, on which prompts and with how much kept; runs nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from gkv_vllm.eval.crosscheck.paged import Eviction
from gkv_vllm.eval.tasks import TASKS
from gkv_vllm.eval.vocabulary import encode

COUNT = 32
"""Tokens generated after each prompt."""
WINDOW = 64
"""kvpress's own default for snapkv."""
DEFAULT_WINDOW = 16
"""Ours."""


@dataclass(frozen=True)
class Row:
    """One line of the report: a policy as one part of us runs it, against one press."""

    policy: str
    where: str
    """`reference` or `cpu`: the worker's scorer over a paged cache, on the keys and queries that
    kvpress had. `engine`: vLLM's engine, from the prompt on."""
    window: int
    tokens: int
    """Length of the prompts."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of our policy."""
    press: dict[str, Any] = field(default_factory=dict)
    """Of the press."""
    spared: int = 0
    """So many of the newest tokens the press is told to keep, as our window is kept."""
    note: str = ""
    scores_comparable: bool = True
    control: bool = False
    """A row that has to disagree: another formula, to see that this check can tell."""

    def eviction(self, budget: int) -> Eviction:
        return Eviction(self.tokens, self.window, budget)


SNAPKV: dict[str, Any] = {
    "policy": "snapkv",
    "settings": {"variant": "kvpress"},
    "press": {"window_size": WINDOW},
    "window": WINDOW,
}
KNORM: dict[str, Any] = {"policy": "knorm"}
STREAMING: dict[str, Any] = {
    "policy": "streaming_llm",
    "settings": {"sinks": 4},
    "press": {"n_sink": 4},
    "scores_comparable": False,
}
ALL_COMPETE = "every token competes"
SAME_WINDOW = "the same window"
ONE_EXEMPT = "all but the newest token compete"
AS_SERVED = "as served: the newest 20 tokens never compete"

ROWS = (
    Row(**STREAMING, where="reference", window=0, tokens=512, note=ALL_COMPETE),
    Row(**STREAMING, where="cpu", window=0, tokens=512, note=ALL_COMPETE),
    Row(**KNORM, where="reference", window=0, tokens=512, note=ALL_COMPETE),
    Row(**KNORM, where="cpu", window=0, tokens=512, note=ALL_COMPETE),
    Row(**SNAPKV, where="reference", tokens=512, note=SAME_WINDOW),
    Row(**SNAPKV, where="cpu", tokens=512, note=SAME_WINDOW),
    Row(**STREAMING, where="engine", window=1, tokens=513, note=ONE_EXEMPT),
    Row(**KNORM, where="engine", window=1, tokens=513, spared=1, note=ONE_EXEMPT),
    Row(**SNAPKV, where="engine", tokens=512, note=SAME_WINDOW),
    Row(**STREAMING, where="engine", window=DEFAULT_WINDOW, tokens=500, note=AS_SERVED),
    Row(**KNORM, where="engine", window=DEFAULT_WINDOW, tokens=500, note=AS_SERVED),
    Row(
        **SNAPKV,
        where="engine",
        tokens=500,
        note="as served: the newest 84 tokens never compete, there 64",
    ),
    Row(
        **SNAPKV | {"settings": {"variant": "gkv"}},
        where="reference",
        tokens=512,
        note="control: maxima in the place of means",
        control=True,
    ),
)
BUDGETS = (128, 256)


def prompts(rows: tuple[Row, ...], seeds: int) -> dict[str, list[int]]:
    """Of every task and length, cut where the length ends: name -> token ids."""
    found = {}
    for tokens in sorted({row.tokens for row in rows}):
        for task in TASKS.values():
            for seed in range(seeds):
                words: list[str] = []
                rng = random.Random(f"{task.name} {seed}")
                while len(words) < tokens:
                    words += task.draw(rng, tokens).words
                found[f"{task.name}-{seed}-{tokens}"] = encode(words[:tokens])
    return found
