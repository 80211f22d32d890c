# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The interface of an eviction policy, and what a policy gets to see; no policy lives here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class RankView:
    """One request, for a policy that ranks blocks by where they are."""

    key: int
    """The same for the same prompt and seed; unseeded sampling takes the request's id instead."""
    event: int
    """How many evictions this request has had since it last started from its prompt."""
    blocks: Sequence[int]
    """Logical blocks that may go, oldest first."""


@dataclass(frozen=True, slots=True)
class LayerView:
    """One request in a few layers, for a policy that scores by queries and keys.

    Live tokens are in logical order; the last `window` of them are the observation window."""

    queries: Tensor
    """[layers, query_heads, window, head_dim], oldest first; rotated, as attention saw them."""
    keys: Tensor
    """[layers, kv_heads, live_tokens, head_dim]"""
    scale: float
    """Softmax scale of the attention layer."""
    softcap: float
    """Logit soft cap of the attention layer; 0 for none."""
    block_size: int
    history: Tensor
    """[layers, kv_heads, live_blocks] float32: what this policy returned last time, 0 where new."""


@dataclass(frozen=True)
class Policy:
    """What stays and what goes. A higher number means: keep.

    A policy is a frozen dataclass; its fields are the keys of `--kv-policy-config`. It overrides
    `score` (and keeps `needs_queries`), or `rank` (and sets `needs_queries = False`)."""

    needs_queries: ClassVar[bool] = True
    """Whether the worker must keep the last queries and score; else the planner asks `rank`."""

    def score(self, view: LayerView) -> Tensor:
        """Block scores [layers, kv_heads, live_blocks] in float32; they are the next `history`."""
        raise NotImplementedError

    def combine(self, scores: Tensor) -> Tensor:
        """One number per block, [live_blocks], out of [layers, kv_heads, live_blocks]."""
        raise NotImplementedError

    def rank(self, view: RankView) -> Sequence[float]:
        """One number per block of `view.blocks`, without looking at the cache."""
        raise NotImplementedError
