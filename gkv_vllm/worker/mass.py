# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Accumulates the attention that each cached token gets, in every step, for policies that ask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class MassBatch:
    """The batch of one step in one KV cache group, as `ops.attention_mass` takes it."""

    live_table: Tensor
    """[requests, blocks] int32"""
    live_lens: Tensor
    """[requests] int32"""
    query_starts: Tensor
    """[requests + 1] int32"""
    protected: Tensor
    """[requests] int32: leading live tokens that do not accumulate; -1 for requests that do not."""


class MassIndex:
    """Whose tokens accumulate attention in this step; one for all layers.

    On a GPU it is filled for every batch, those that warm up or are captured included, with tensors
    that keep their address: a CUDA graph reads them again in every step."""

    def __init__(self) -> None:
        self.batches: dict[int, MassBatch] = {}

    def clear(self) -> None:
        """Nothing accumulates until the next `fill`."""
        self.batches.clear()

    def fill(
        self,
        group: int,
        live_table: Tensor,
        live_lens: Tensor,
        query_starts: Tensor,
        protected: Tensor,
    ) -> None:
        """The batch of a KV cache group, as attention will see it; see `MassBatch`."""
        self.batches[group] = MassBatch(live_table, live_lens, query_starts, protected)
