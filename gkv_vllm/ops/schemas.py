# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The schema of each operator, once for all devices, and what its result looks like without data.

Importing this defines `torch.ops.gkv`; compiled libraries add the implementations. What the
operators compute stands in `paged.PagedOps`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("gkv", "DEF")  # noqa: TOR901


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operator; the decorated function is its fake."""

    def define(fake: Callable[..., Any]) -> Callable[..., Any]:
        name = library.define(f"{fake.__name__}{schema}")
        torch.library.register_fake(f"gkv::{name.split('::')[-1]}", fake, lib=library)
        return fake

    return define


@_operator(
    "(Tensor queries, Tensor kv_cache, Tensor block_ids, int live_tokens, float scale, "
    "float softcap, str form) -> Tensor"
)
def local_scores(queries: Tensor, kv_cache: Tensor, block_ids: Tensor, live_tokens: int, *_: Any):
    return _floats(kv_cache, kv_cache.shape[1], live_tokens - queries.shape[1])


@_operator(
    "(Tensor kv_cache, Tensor block_ids, int start, int live_tokens, float threshold, "
    "bool within_blocks) -> Tensor"
)
def redundancy(kv_cache: Tensor, block_ids: Tensor, start: int, live_tokens: int, *_: Any):
    return _floats(kv_cache, kv_cache.shape[1], live_tokens - start)


@_operator("(Tensor kv_cache, Tensor block_ids, int start, int live_tokens) -> Tensor")
def superseded(kv_cache: Tensor, block_ids: Tensor, start: int, live_tokens: int):
    return _floats(kv_cache, kv_cache.shape[1], live_tokens - start)


@_operator("(Tensor kv_cache, Tensor block_ids, int live_tokens) -> Tensor")
def key_norms(kv_cache: Tensor, block_ids: Tensor, live_tokens: int):
    return _floats(kv_cache, kv_cache.shape[1], live_tokens)


@_operator("(Tensor scores, int block_size) -> Tensor")
def block_max(scores: Tensor, block_size: int):
    return _floats(scores, *scores.shape[:-1], scores.shape[-1] // block_size)


@_operator("(Tensor scores, int count) -> Tensor")
def topk_keep(scores: Tensor, count: int):
    return scores.new_empty((*scores.shape[:-1], count), dtype=torch.int64)


@_operator(
    "(Tensor(a!) kv_cache, Tensor(b!)? plane, Tensor source_ids, Tensor target_ids, Tensor keep)"
    " -> ()"
)
def compact(*_: Any):
    return None


@_operator(
    "(Tensor queries, Tensor kv_cache, Tensor(a!) plane, Tensor live_table, Tensor live_lens, "
    "Tensor query_starts, Tensor protected, float scale, float softcap) -> ()"
)
def attention_mass(*_: Any):
    return None


@_operator("(Tensor queries, Tensor places, Tensor(a!) ring) -> ()")
def store_window_queries(*_: Any):
    return None


@_operator(
    "(Tensor(a!)[] kv_caches, Tensor(b!)[] planes, Tensor source_ids, Tensor target_ids, "
    "Tensor target_places, Tensor keep) -> ()"
)
def compact_layers(*_: Any):
    return None


@_operator(
    "(Tensor block_table, Tensor seq_lens, Tensor query_starts, Tensor slots, int block_size, "
    "int window, Tensor(a!) live_table, Tensor(b!) live_lens, Tensor(c!) places) -> ()"
)
def prepare_step(*_: Any):
    return None


@_operator(
    "(Tensor block_table, Tensor seq_lens, int block_size)"
    " -> (Tensor live_table, Tensor live_lens, int rows_with_holes)"
)
def squeeze_live_table(block_table: Tensor, seq_lens: Tensor, block_size: int):
    raise NotImplementedError("the shape of a live table depends on the data")


def _floats(like: Tensor, *size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.float32)
