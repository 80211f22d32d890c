# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Rings that keep the last `window` queries of the requests that are about to be scored."""

from __future__ import annotations

import torch
from torch import Tensor

from gkv_vllm.engine.plan import Recording
from gkv_vllm.ops.paged import PagedOps


class RingIndex:
    """Which tokens of this step's batch go to which places of the rings; one for all layers."""

    def __init__(self, window: int, device: torch.device) -> None:
        self.window = window
        self.device = device
        self.source: Tensor | None = None
        self.target: Tensor | None = None

    def window_of(self, slot: int, num_tokens: int) -> Tensor:
        """The places of the window before position `num_tokens`, oldest first: [window] int64."""
        positions = torch.arange(num_tokens - self.window, num_tokens, device=self.device)
        return positions % self.window + slot * self.window

    @property
    def filled(self) -> bool:
        """Whether this step's places are known: they are the same in every KV cache group."""
        return self.source is not None

    def clear(self) -> None:
        """Nothing is recorded until the next `fill`."""
        self.source = self.target = None

    def fill(self, recordings: list[tuple[Recording, int, int]]) -> None:
        """Each recording comes with its request's token range [start, end) in the batch.

        The newest query of the range sits at position `num_tokens - 1`; position p goes to place
        p mod window, so a ring always holds the last `window` positions once they were recorded."""
        sources: list[int] = []
        targets: list[int] = []
        for recording, start, end in recordings:
            count = min(self.window, end - start)
            first = recording.num_tokens - count
            base = recording.slot * self.window
            sources.extend(range(end - count, end))
            targets.extend(base + (first + i) % self.window for i in range(count))
        self.source = torch.tensor(sources, dtype=torch.int64, device=self.device)
        self.target = torch.tensor(targets, dtype=torch.int64, device=self.device)


class QueryRing:
    """The rings of one layer: [slots * window, query_heads, head_dim]."""

    def __init__(
        self,
        index: RingIndex,
        ops: PagedOps,
        slots: int,
        query_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.index = index
        self.ops = ops
        self.queries = torch.zeros(
            slots * index.window, query_heads, head_dim, dtype=dtype, device=index.device
        )

    def store(self, queries: Tensor) -> None:
        """Copy this step's window queries out of the batch. queries [tokens, heads, head_dim]"""
        if self.index.source is None:
            return
        assert self.index.target is not None
        self.ops.store_window_queries(queries, self.index.source, self.index.target, self.queries)

    def read(self, places: Tensor) -> Tensor:
        """The queries at these places, such as `RingIndex.window_of`: [heads, window, head_dim]."""
        return self.queries.index_select(0, places).transpose(0, 1)
