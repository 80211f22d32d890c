# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""One attention layer under the policy: its cache, what is kept beside it, and its queries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gkv_vllm.ops.paged import PagedOps
from gkv_vllm.worker.mass import MassIndex
from gkv_vllm.worker.rings import RingIndex


@dataclass(slots=True)
class EvictedLayer:
    """One attention layer; also the sink that its attention hands the queries of a step to."""

    ops: PagedOps
    kv_group: int
    """Its KV cache group: layers of different groups hold the same logical blocks elsewhere."""
    layer_group: int
    """Layers of one layer group keep the same blocks."""
    kv_cache: Tensor
    plane: Tensor | None
    """[num_blocks, kv_heads, block_size] float32: one number per cached token."""
    ring: Tensor | None
    """[slots * window, query_heads, head_dim]"""
    ring_index: RingIndex | None
    mass: MassIndex | None
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float

    def before_attention(self, queries: Tensor) -> None:
        """queries [tokens, query_heads, head_dim], rotated; the caller may reuse them."""
        if self.ring is None:
            return
        assert self.ring_index is not None
        if self.ring_index.filled or self.ring_index.every_step:
            self.ops.store_window_queries(queries, self.ring_index.places, self.ring)

    def after_attention(self, queries: Tensor) -> None:
        """The same queries once the keys and values of the step are in the cache."""
        if self.mass is None or (batch := self.mass.batches.get(self.kv_group)) is None:
            return
        assert self.plane is not None
        self.ops.attention_mass(
            queries,
            self.kv_cache,
            self.plane,
            batch.live_table,
            batch.live_lens,
            batch.query_starts,
            batch.protected,
            self.scale,
            self.softcap,
        )
