# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Squeezes the holes out of block tables and finds each token's ring place: one launch per step.

One program per row of the batch, and some that clear the places of padding tokens. All of it is
read from device memory, so nothing waits for the device and outputs keep their addresses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .requests import check_int32
from .signatures import Signature

TILE = 1024
"""Blocks, or tokens, that a program takes at once."""


@triton.jit(do_not_specialize=["rows"])
def _prepare_kernel(
    block_table,
    seq_lens,
    query_starts,
    slots,
    live_table,
    live_lens,
    places,
    rows,
    capacity,
    table_stride,
    live_stride,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    PLACES: tl.constexpr,
):
    row = tl.program_id(0)
    offsets = tl.arange(0, TILE)
    if row < rows:
        length = tl.load(seq_lens + row)
        used = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
        source = block_table + row.to(tl.int64) * table_stride
        target = live_table + row.to(tl.int64) * live_stride
        count = 0
        for start in range(0, used, TILE):
            at = start + offsets
            ids = tl.load(source + at, mask=at < used, other=0)
            live = (ids != 0).to(tl.int32)
            tl.store(target + count + tl.cumsum(live, 0) - 1, ids, mask=ids != 0)
            count += tl.sum(live, 0)
        for start in range(count, used, TILE):
            at = start + offsets
            tl.store(target + at, tl.zeros([TILE], tl.int32), mask=at < used)
        tl.store(live_lens + row, length - (used - count) * BLOCK_SIZE)

        if PLACES:
            first, end = tl.load(query_starts + row), tl.load(query_starts + row + 1)
            slot = tl.load(slots + row)
            for start in range(first, end, TILE):
                token = start + offsets
                position = length - (end - token)
                # A dummy batch may hold more queries than positions: those have no place either.
                recorded = (slot >= 0) & (end - token <= WINDOW) & (position >= 0)
                place = tl.where(recorded, slot * WINDOW + position % WINDOW, -1)
                tl.store(places + token, place, mask=token < end)
    elif PLACES:
        token = (row - rows) * TILE + offsets
        padding = (token >= tl.load(query_starts + rows)) & (token < capacity)
        tl.store(places + token, tl.full([TILE], -1, tl.int32), mask=padding)


def prepare_step(
    block_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    slots: Tensor,
    *,
    block_size: int,
    window: int,
    live_table: Tensor,
    live_lens: Tensor,
    places: Tensor,
) -> None:
    """`squeeze_live_table`, and which tokens of the batch go to which places of the query rings.

    query_starts [rows + 1] int32, not decreasing from 0, are the rows' first tokens in the batch;
    slots [rows] int32 their ring slots, -1 where nothing is recorded. Writes places [tokens] int32,
    at least as many as the batch has: for the last `window` tokens of a recorded row
    `slot * window + position % window`, the newest being at position `seq_len - 1`; -1 for all
    others, to the end. ValueError names what does not fit."""
    rows = block_table.shape[0]
    _check("prepare_step", block_table, seq_lens, live_table, live_lens, block_size)
    if window < 1:
        raise ValueError(f"prepare_step: window must be at least 1, got {window}")
    for name, tensor, size in (("query_starts", query_starts, rows + 1), ("slots", slots, rows)):
        check_int32(f"prepare_step: {name}", tensor, 1, block_table.device)
        if tensor.shape[0] != size:
            raise ValueError(f"prepare_step: {name} must be [{size}], got {tuple(tensor.shape)}")
    check_int32("prepare_step: places", places, 1, block_table.device)
    capacity = places.shape[0]
    _prepare_kernel[(rows + triton.cdiv(capacity, TILE),)](
        block_table,
        seq_lens,
        query_starts,
        slots,
        live_table,
        live_lens,
        places,
        rows,
        capacity,
        block_table.stride(0),
        live_table.stride(0),
        BLOCK_SIZE=block_size,
        WINDOW=window,
        TILE=TILE,
        PLACES=True,
        num_warps=4,
    )


def squeeze_live_table(
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    block_size: int,
    live_table: Tensor,
    live_lens: Tensor,
) -> None:
    """Each row's live blocks, in order, and its live length.

    block_table [rows, blocks] int32, 0 standing for a hole, and seq_lens [rows] int32, 0 for rows
    that pad the batch; what a row holds beyond its length is never read. Writes live_table
    [rows or more, blocks or more] int32 (live blocks, then zeros, as far as the row's length goes)
    and live_lens [rows or more] int32, one block less for each hole. Rows of both tables may be
    apart. ValueError names what does not fit."""
    rows = block_table.shape[0]
    _check("squeeze_live_table", block_table, seq_lens, live_table, live_lens, block_size)
    if not rows:
        return
    _prepare_kernel[(rows,)](
        block_table,
        seq_lens,
        None,
        None,
        live_table,
        live_lens,
        None,
        rows,
        0,
        block_table.stride(0),
        live_table.stride(0),
        BLOCK_SIZE=block_size,
        WINDOW=1,
        TILE=TILE,
        PLACES=False,
        num_warps=4,
    )


def _check(
    op: str,
    block_table: Tensor,
    seq_lens: Tensor,
    live_table: Tensor,
    live_lens: Tensor,
    block_size: int,
) -> None:
    if block_size < 1:
        raise ValueError(f"{op}: block_size must be at least 1, got {block_size}")
    device = block_table.device
    for name, table in (("block_table", block_table), ("live_table", live_table)):
        if table.dtype != torch.int32 or table.ndim != 2 or table.stride(1) != 1:
            raise ValueError(
                f"{op}: {name} must be int32 [rows, blocks] with dense rows, "
                f"got {table.dtype} {tuple(table.shape)}"
            )
    rows, width = block_table.shape
    if live_table.shape[0] < rows or live_table.shape[1] < width or live_table.device != device:
        raise ValueError(
            f"{op}: live_table must be at least [{rows}, {width}] on {device}, "
            f"got {tuple(live_table.shape)} on {live_table.device}"
        )
    if live_table.data_ptr() == block_table.data_ptr():
        raise ValueError(f"{op}: live_table must not be block_table itself")
    check_int32(f"{op}: seq_lens", seq_lens, 1, device)
    check_int32(f"{op}: live_lens", live_lens, 1, device)
    if seq_lens.shape[0] != rows:
        raise ValueError(f"{op}: seq_lens must be [{rows}], got {tuple(seq_lens.shape)}")
    if live_lens.shape[0] < rows:
        raise ValueError(f"{op}: live_lens must be at least [{rows}], got {tuple(live_lens.shape)}")


def _signatures() -> list[Signature]:
    tables = ("block_table", "seq_lens", "live_table", "live_lens")
    types = dict.fromkeys(tables, "*i32") | dict.fromkeys(
        ("rows", "capacity", "table_stride", "live_stride"), "i32"
    )
    ring = ("query_starts", "slots", "places")
    aligned = (*tables, "table_stride", "live_stride")
    sizes = dict(BLOCK_SIZE=16, TILE=TILE)
    return [
        Signature(
            kernel=_prepare_kernel,
            name="prepare_step",
            signature=types | dict.fromkeys(ring, "*i32"),
            constexprs=dict(sizes, WINDOW=16, PLACES=True),
            divisible_by_16=(*aligned, *ring, "capacity"),
        ),
        Signature(
            kernel=_prepare_kernel,
            name="squeeze_live_table",
            signature=types,
            constexprs=dict(sizes, WINDOW=1, PLACES=False, **dict.fromkeys(ring)),
            divisible_by_16=(*aligned, "capacity"),
        ),
    ]


SIGNATURES = _signatures()
