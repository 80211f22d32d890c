# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Rings that keep the last `window` queries of the requests that are about to be scored."""

from __future__ import annotations

import torch
from torch import Tensor

from gkv_vllm.engine.plan import Recording
from gkv_vllm.ops.upload import upload


class RingIndex:
    """Which tokens of this step's batch go to which places of the rings; one for all layers.

    Position p of a request goes to place `slot * window + p mod window`, so a ring always holds the
    last `window` positions once they were recorded. `places` keeps its address: a CUDA graph
    reads it again in every step."""

    def __init__(
        self, window: int, max_tokens: int, device: torch.device, *, every_step: bool = False
    ) -> None:
        """max_tokens: the most tokens of a batch, padding included."""
        self.window = window
        self.device = device
        self.places = torch.full((max_tokens,), -1, dtype=torch.int32, device=device)
        """[max_tokens] int32: the place of each token of the batch, -1 if it is not recorded."""
        self.filled = False
        """Whether this step's places are known: they are the same in every KV cache group."""
        self.every_step = every_step
        """Whether queries are stored even where no token has a place: a CUDA graph was captured
        once for all steps."""

    def window_of(self, slot: int, num_tokens: int) -> Tensor:
        """The places of the window before position `num_tokens`, oldest first: [window] int64."""
        first = num_tokens - self.window
        base = slot * self.window
        return upload([base + (first + i) % self.window for i in range(self.window)], self.device)

    def clear(self) -> None:
        """Nothing is recorded until the next `fill`."""
        if self.filled:
            self.places.fill_(-1)
            self.filled = False

    def fill(self, recordings: list[tuple[Recording, int, int]]) -> None:
        """Each recording comes with its request's token range [start, end) in the batch.

        The newest query of the range sits at position `num_tokens - 1`. For places on the host; on
        a GPU the operator that squeezes the live table fills them."""
        places = self.places.numpy()
        for recording, start, end in recordings:
            count = min(self.window, end - start)
            first, base = recording.num_tokens - count, recording.slot * self.window
            places[end - count : end] = [base + (first + i) % self.window for i in range(count)]
        self.filled = True


class QueryRings:
    """The rings of all layers: [layers, slots * window, query_heads, head_dim]."""

    def __init__(
        self,
        window: int,
        *,
        layers: int,
        slots: int,
        query_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.queries = torch.zeros(
            layers, slots * window, query_heads, head_dim, dtype=dtype, device=device
        )

    def of_layer(self, layer: int) -> Tensor:
        """Where one layer's queries are stored: [slots * window, query_heads, head_dim]."""
        return self.queries[layer]

    def read(self, places: Tensor) -> Tensor:
        """The queries at these places, such as `RingIndex.window_of`.

        Returns [layers, query_heads, window, head_dim]."""
        return self.queries.index_select(1, places).transpose(1, 2)
