# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Squeezes the holes out of block tables, so that any paged kernel sees only live blocks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NULL_BLOCK = 0
"""vLLM's null block: the id that stands in a block table where nothing is stored."""


class LiveTable(NamedTuple):
    """What attention reads instead of the runner's own table and lengths."""

    block_table: Tensor
    """[requests, blocks] int32; the live blocks of each row first, in logical order."""
    seq_lens: Tensor
    """[requests] int32; tokens in live blocks."""


def squeeze(block_table: Tensor, seq_lens: Tensor, block_size: int) -> LiveTable:
    """Drop the null entries of each row and shorten its length by one block for each.

    block_table [requests, width] int32 and seq_lens [requests] int32, both on the CPU, stay as they
    are; without holes they are returned themselves. Holes never include a row's last block, so the
    tail of a row stays its tail, and causal attention over the live table is exact over what
    survived. In NumPy: on tables of this size a torch call costs more than its work."""
    lengths = seq_lens.numpy()
    used = -(-lengths // block_size)
    columns = np.arange(used.max(initial=0))
    rows = block_table.numpy()[:, : len(columns)]
    live = (rows != NULL_BLOCK) & (columns < used[:, None])
    live_blocks = live.sum(1)
    holes = used - live_blocks
    if not holes.any():
        return LiveTable(block_table, seq_lens)
    squeezed = np.zeros_like(rows)
    squeezed[columns < live_blocks[:, None]] = rows[live]
    live_lengths = (lengths - holes * block_size).astype(lengths.dtype)
    return LiveTable(torch.from_numpy(squeezed), torch.from_numpy(live_lengths))


def prepare_step(
    block_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    slots: Tensor,
    block_size: int,
    window: int,
    live_table: Tensor,
    live_lens: Tensor,
    places: Tensor | None,
) -> None:
    """`squeeze` and the ring places of a batch, into tensors that keep their address.

    The readable form of the kernels of that name: torch, on any device, without a wait. All int32:
    block_table [rows, width], seq_lens [rows] (0 for rows that pad the batch), query_starts
    [rows + 1], slots [rows] (-1: queries are not kept). Writes live_table [rows, width], of which
    what follows a row's live blocks is 0 up to the row's used blocks and undefined behind them;
    live_lens [rows]; and places [tokens], if given: where in the rings each token's query goes,
    `slot * window + position % window` for the last `window` of a request that is kept, else -1.
    """
    rows, width = block_table.shape
    columns = torch.arange(width, device=block_table.device)
    used = ((seq_lens + block_size - 1) // block_size)[:, None]
    is_live = (block_table != NULL_BLOCK) & (columns < used)
    order = is_live.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    count = is_live.sum(1, keepdim=True, dtype=torch.int32)
    live_table.copy_(block_table.gather(1, order).masked_fill(columns >= count, 0))
    live_lens.copy_(seq_lens - (used - count)[:, 0] * block_size)
    if places is None:
        return
    token = torch.arange(len(places), device=places.device)
    row = torch.searchsorted(query_starts[1:].contiguous(), token.int(), right=True)
    in_batch, row = row < rows, row.clamp(max=rows - 1)
    behind = query_starts[1:][row] - 1 - token  # tokens of the request that are newer
    position, slot = seq_lens[row] - 1 - behind, slots[row]
    place = slot * window + position % window
    places.copy_(torch.where(in_batch & (behind < window) & (slot >= 0), place, -1))
