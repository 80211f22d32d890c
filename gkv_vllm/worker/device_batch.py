# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The live table of a batch on a GPU: made without a wait, at addresses that a CUDA graph keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from gkv_vllm.ops.paged import PagedOps
from gkv_vllm.ops.upload import upload
from gkv_vllm.worker.mass import MassIndex
from gkv_vllm.worker.rings import RingIndex

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from gkv_vllm.worker.evictor import Evictor


class DeviceBatch:
    """What a metadata builder of one KV cache group calls in every step, captured ones included.

    One launch squeezes all rows and, for the first group, finds the ring places of the batch's
    tokens. Where attention is accumulated, one copy says for which rows. A graph that was captured
    with these buffers sees what the next step wrote into them. Scheduler metadata that a backend
    computes ahead of time sees live lengths, since it is computed from what this returns."""

    def __init__(
        self,
        evictor: Evictor,
        ops: PagedOps,
        *,
        block_size: int,
        max_rows: int,
        group: int,
        ring_index: RingIndex | None,
        mass_index: MassIndex | None,
        device: torch.device,
    ) -> None:
        """ring_index: for the first KV cache group; the others leave it alone."""
        self.evictor = evictor
        self.ops = ops
        self.block_size = block_size
        self.group = group
        self.ring_index = ring_index
        self.mass_index = mass_index
        self.live_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.no_slots = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self.protected = self.no_slots.clone()
        self.live_table: Tensor | None = None

    def __call__(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """The same batch over live tables and live lengths."""
        rows = metadata.seq_lens.shape[0]
        if self.live_table is None:  # the first batch, before anything is captured, has its width
            width = metadata.block_table_tensor.shape[1]
            size = (self.live_lens.shape[0], width)
            self.live_table = torch.zeros(size, dtype=torch.int32, device=self.live_lens.device)
        live_table, live_lens = self.live_table[:rows], self.live_lens[:rows]
        self.ops.prepare_step(
            metadata.block_table_tensor,
            metadata.seq_lens,
            metadata.query_start_loc,
            self._slots(metadata, rows),
            self.block_size,
            self.ring_index.window if self.ring_index is not None else 1,
            live_table,
            live_lens,
            self.ring_index.places if self.ring_index is not None else None,
        )
        if self.mass_index is not None:
            protected = self._protected(metadata, rows)
            # The runner's own buffer, of which attention in a graph reads the same part.
            starts = metadata.query_start_loc
            self.mass_index.fill(self.group, live_table, live_lens, starts, protected)
        live = replace(
            metadata,
            block_table_tensor=live_table,
            seq_lens=live_lens,
            _num_computed_tokens_cache=None,
        )
        holes = self.evictor.holes(metadata)
        return live if holes is None else self._bounded(live, holes)

    def _slots(self, metadata: CommonAttentionMetadata, rows: int) -> Tensor:
        """The ring slot of each row, -1 where its queries are not kept: [rows] int32."""
        slots = self.evictor.slots(metadata, rows) if self.ring_index is not None else None
        if slots is None:
            return self.no_slots[:rows]
        return upload(slots, self.live_lens.device, torch.int32)

    def _protected(self, metadata: CommonAttentionMetadata, rows: int) -> Tensor:
        """Whose tokens accumulate attention, as `MassBatch.protected`, where a graph finds it."""
        protected, of_rows = self.evictor.protected(metadata, rows), self.protected[:rows]
        if protected is None:
            return of_rows.fill_(-1)
        return of_rows.copy_(upload(protected, of_rows.device, torch.int32))

    def _bounded(self, live: CommonAttentionMetadata, holes: np.ndarray) -> CommonAttentionMetadata:
        """What the host knows of the lengths, less the holes: [rows that are not padding]."""
        if live.seq_lens_cpu_upper_bound is None:
            return live
        bound = live.seq_lens_cpu_upper_bound.numpy().copy()
        bound[: len(holes)] -= holes * self.block_size
        return replace(
            live,
            seq_lens_cpu_upper_bound=torch.from_numpy(bound),
            max_seq_len=int(bound.max()),
        )
