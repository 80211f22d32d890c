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
