# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Squeezes the holes out of block tables, so that any paged kernel sees only live blocks."""

from __future__ import annotations

from typing import NamedTuple

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

    block_table [requests, width] int32 and seq_lens [requests] int32 stay as they are; without
    holes they are returned themselves. Holes never include a row's last block, so the tail of
    a row stays its tail, and causal attention over the live table is exact over what survived."""
    used_blocks = (seq_lens + (block_size - 1)) // block_size
    width = int(used_blocks.max()) if len(used_blocks) else 0
    table = block_table[:, :width]
    used = torch.arange(width, device=table.device) < used_blocks.unsqueeze(1)
    live = used & (table != NULL_BLOCK)
    holes = used_blocks - live.sum(1)
    if not holes.any():
        return LiveTable(block_table, seq_lens)
    # Every live entry moves left by the holes before it; the rest goes to a column that is cut off.
    column = torch.where(live, live.cumsum(1) - 1, width)
    squeezed = table.new_zeros(table.shape[0], width + 1).scatter_(1, column, table)
    return LiveTable(
        squeezed[:, :width].contiguous(), (seq_lens - holes * block_size).to(seq_lens.dtype)
    )
