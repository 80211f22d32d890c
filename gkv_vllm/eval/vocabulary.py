# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The words of all tasks and the tokenizer that gives each word one token; no task's rules."""

from __future__ import annotations

import string
from typing import Any

PAD, END = "<pad>", "<end>"
TASK_WORDS = ("ledger", "once", "trace", "copyback", "prose")
MARKS = (";", "|", ".", "code", "recall", "span", "copy", "the", "at")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = tuple(string.ascii_lowercase)
DIGITS = tuple(string.digits)
SETS = tuple(f"{name}=" for name in NAMES)
ASKS = tuple(f"{name}?" for name in NAMES)
LINES = tuple(f"@{number}" for number in range(64))
SYMBOLS = tuple(f"{row}{column}" for row in "ABCDEFGHIJKL" for column in range(8))
OWNERS = tuple("#" + greek for greek in ("alpha", "beta", "gamma", "delta"))
HOURS = tuple(f"{hour:02d}h" for hour in range(24))
MINUTES = tuple(f":{minute:02d}" for minute in range(60))
PEOPLE = _words(
    "Ada Ben Cleo Dan Eve Finn Gus Hana Ivo Jane Karl Lena Mia Noah Olga Paul Quinn Rosa "
    "Sam Tara Uma Vera Will Xena Yves Zoe Amir Bea Cem Dora Emil Faye"
)
OF_PEOPLE = tuple(f"{person}'s" for person in PEOPLE)
THINGS = _words(
    "lamp book coin drum flute glove hat kite lens map net oar pen quilt rope saw tent "
    "urn vase wheel axe bell cup dice fan gem harp ink jar key lute mask"
)
PLACES = _words(
    "attic barn cafe dock estate farm garden hall inn jetty kiln library mill nursery "
    "office park quarry river school tower valley wharf yard zoo bridge cellar depot "
    "ferry gate harbour island lane"
)
VERBS = _words("falls hums rolls shakes shines turns waits wobbles")

WORDS: tuple[str, ...] = (
    PAD, END, *TASK_WORDS, *MARKS, *NAMES, *DIGITS, *SETS, *ASKS, *LINES, *SYMBOLS, *OWNERS,
    *HOURS, *MINUTES, *OF_PEOPLE, *THINGS, *PLACES, *VERBS,
)  # fmt: skip
IDS = {word: number for number, word in enumerate(WORDS)}
SIZE = -(-len(WORDS) // 64) * 64
"""Rows of the embedding: vLLM pads a vocabulary to a multiple of 64 anyway."""


def encode(words: list[str]) -> list[int]:
    """The token of each word; KeyError for a word that no task has."""
    return [IDS[word] for word in words]


def decode(tokens: list[int]) -> list[str]:
    """The word of each token; `PAD` for one that only pads the vocabulary."""
    return [WORDS[token] if token < len(WORDS) else PAD for token in tokens]


def tokenizer(max_positions: int) -> Any:
    """A Hugging Face tokenizer: words are split at white space, and joined by a space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocab=dict(IDS), unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([PAD, END])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=PAD,
        eos_token=END,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )
