# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What the model forgot: the text of a request, evicted tokens faded, the score as colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from gkv_vllm.record import RecordError
from gkv_vllm.view.fates import Fates
from gkv_vllm.view.keepmap import about
from gkv_vllm.view.page import pack, page


def html(fates: Fates, texts: Sequence[str]) -> str:
    """The page; `texts` is what each token adds to the text."""
    data = {
        **about(fates),
        "ids": fates.record.token_ids.tolist(),
        "texts": list(texts),
        "scores": pack(fates.scores),
        "ranks": pack(fates.ranks()),
    }
    return page("forgot", "What the model forgot", data)


def texts_of(fates: Fates, model: str) -> list[str]:
    """What each token of a request adds to its text, by the tokenizer of a model.

    A row of the embedding that only pads the vocabulary has no text: its number stands there."""
    tokenizer, rows = _tokenizer(model)
    ids = fates.record.token_ids.tolist()
    unique = sorted(set(ids))
    named = tokenizer.convert_ids_to_tokens(unique)
    nameless = {id_ for id_, name in zip(unique, named, strict=True) if name is None}
    if (most := max(nameless, default=0)) >= rows:
        raise RecordError(
            f"{model} has no token {most}, which {fates.record.path} holds; name the model that "
            f"made it ({fates.record.header.model})"
        )

    def decode(some: Sequence[int]) -> str:
        return tokenizer.decode(some, clean_up_tokenization_spaces=False)

    found: list[str] = []
    for is_nameless, run in groupby(ids, nameless.__contains__):
        some = list(run)
        found += [f"<{id_}>" for id_ in some] if is_nameless else pieces(some, decode)
    return found


def pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds. One that ends inside a character adds nothing, and the token
    that completes it adds it all."""
    found, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, after = decode(ids[start:done]), decode(ids[start:end])
        if len(after) > len(before) and not after.endswith("\ufffd"):
            found.append(after[len(before) :])
            start, done = done, end
        else:
            found.append("")
    return found


def _tokenizer(model: str) -> tuple[Any, int]:
    """The tokenizer of a model, and how many rows its embedding has."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        config = AutoConfig.from_pretrained(model, local_files_only=True)
    except Exception as error:  # whatever its many formats raise
        what = "has no tokenizer and config that can be read"
        if not Path(model).is_dir():
            what = "is no folder, nor a model in the Hugging Face cache"
        reason = str(error).strip().split("\n")[0]
        raise RecordError(f"{model} {what} ({type(error).__name__}: {reason})") from None
    return tokenizer, config.get_text_config().vocab_size
