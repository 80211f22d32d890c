# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""How scoring kernels see the requests that are due in one step: their tables and their lengths.

What they return per request has lengths of its own, so it lies in one flat buffer, request after
request, each [layers, kv_heads, n]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 7
"""Rows of `DueRequests.numbers`, in the order of the accessors below."""


@triton.jit
def live_tokens_of(numbers, request, requests):
    return tl.load(numbers + request)


@triton.jit
def protected_of(numbers, request, requests):
    return tl.load(numbers + requests + request)


@triton.jit
def candidates_of(numbers, request, requests):
    return tl.load(numbers + 2 * requests + request)


@triton.jit
def remembered_of(numbers, request, requests):
    return tl.load(numbers + 3 * requests + request)


@triton.jit
def older_before(numbers, request, requests):
    """Tokens older than the window, of all requests before this one."""
    return tl.load(numbers + 4 * requests + request).to(tl.int64)


@triton.jit
def unprotected_before(numbers, request, requests):
    """Unprotected live tokens of all requests before this one."""
    return tl.load(numbers + 5 * requests + request).to(tl.int64)


@triton.jit
def candidates_before(numbers, request, requests):
    """Candidate tokens of all requests before this one."""
    return tl.load(numbers + 6 * requests + request).to(tl.int64)


@triton.jit
def row_of(before, length, layer, head, layers, heads):
    """Where a layer's and head's numbers begin in a flat buffer, `length` for this request."""
    return before * layers * heads + (layer.to(tl.int64) * heads + head) * length


@triton.jit
def load_live_keys(
    keys,
    table,
    positions,
    limit,
    block_stride,
    token_stride,
    dim_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """The keys at these live positions of one head, [positions, DIM]: 0 from `limit` on.

    `keys` points at the head in block 0, `table` at the request's live blocks. Head sizes are
    padded with zeros to `DIM`, a power of two."""
    valid = positions < limit
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    dim = tl.arange(0, DIM)
    places = blocks * block_stride + (positions % BLOCK_SIZE).to(tl.int64) * token_stride
    return tl.load(
        keys + places[:, None] + dim[None, :] * dim_stride,
        mask=valid[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class DueRequests:
    """The requests that are due in one step, all with the same window.

    A request's live tokens, in order, are: `protected` ones that never compete, `num_candidates`
    that do, and the recent ones, the last `window` of which made the queries. Each number is a
    tuple with one int per request."""

    tables: Tensor
    """[tables, requests, blocks] int32: live blocks in logical order, one table per KV cache group;
    what follows a request's last live block is never read."""
    table_of_layer: Tensor
    """[layers] int32: which table is the layer's."""
    numbers: Tensor
    """[NUMBERS, requests] int32: the lengths and their sums, for the kernels."""
    live_tokens: tuple[int, ...]
    protected: tuple[int, ...]
    num_candidates: tuple[int, ...]
    remembered: tuple[int, ...]
    """How many leading units have a history."""
    window: int
    block_size: int

    @classmethod
    def of(
        cls,
        tables: Tensor,
        table_of_layer: Tensor,
        *,
        live_tokens: Sequence[int],
        protected: Sequence[int],
        num_candidates: Sequence[int],
        remembered: Sequence[int],
        window: int,
        block_size: int,
    ) -> DueRequests:
        """Check that the numbers fit together, and bring them to the device of `tables`.

        One upload, to a GPU from pinned memory without waiting. ValueError names what does not
        fit."""
        check_int32("tables", tables, 3, tables.device)
        check_int32("table_of_layer", table_of_layer, 1, tables.device)
        requests, width = tables.shape[1:]
        columns = {
            "live_tokens": tuple(live_tokens),
            "protected": tuple(protected),
            "num_candidates": tuple(num_candidates),
            "remembered": tuple(remembered),
        }
        for name, column in columns.items():
            if len(column) != requests:
                raise ValueError(f"{name} must have {requests} numbers, got {len(column)}")
        if requests == 0 or window < 1:
            raise ValueError(f"no requests, or no window: {requests} requests, window {window}")
        for live, first, count, past in zip(*columns.values(), strict=True):
            if first < 0 or count < 1 or past < 0 or first % block_size or count % block_size:
                raise ValueError(
                    f"protected and num_candidates must be multiples of {block_size} tokens, and "
                    f"some must compete, got {first} and {count}; remembered {past}"
                )
            if first + count > live - window or live > width * block_size:
                raise ValueError(
                    f"{live} live tokens do not hold {first} protected ones, {count} candidates "
                    f"and a window of {window}, or are more than {width} blocks"
                )
        sums = (
            _before(live - window for live in columns["live_tokens"]),
            _before(live - first for live, first in zip(live_tokens, protected, strict=True)),
            _before(columns["num_candidates"]),
        )
        rows = torch.tensor([*columns.values(), *sums], dtype=torch.int32)
        if tables.device.type != "cpu":
            rows = rows.pin_memory().to(tables.device, non_blocking=True)
        return cls(
            tables=tables,
            table_of_layer=table_of_layer,
            numbers=rows,
            window=window,
            block_size=block_size,
            **columns,
        )

    @property
    def num_requests(self) -> int:
        return self.tables.shape[1]

    @property
    def older(self) -> list[int]:
        """How many live tokens of each request are older than its window."""
        return [live - self.window for live in self.live_tokens]

    @property
    def unprotected(self) -> list[int]:
        """How many live tokens of each request are not protected."""
        return [a - b for a, b in zip(self.live_tokens, self.protected, strict=True)]

    def units(self, unit: int) -> list[int]:
        """How many units of so many tokens compete in each request."""
        return [count // unit for count in self.num_candidates]


def check_int32(name: str, tensor: Tensor, ndim: int, device: torch.device) -> None:
    """ValueError unless it is a dense int32 tensor of so many dimensions on this device."""
    if tensor.dtype != torch.int32 or tensor.ndim != ndim or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous int32 with {ndim} dimensions, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, is on {tensor.device}")


def check_layers(due: DueRequests, layers: int, kv_block_size: int) -> None:
    """ValueError unless `due` describes so many layers with caches of this block size."""
    if due.table_of_layer.shape[0] != layers:
        raise ValueError(
            f"due.table_of_layer must be [{layers}], one for each layer of the caches, "
            f"got {tuple(due.table_of_layer.shape)}"
        )
    if due.block_size != kv_block_size:
        raise ValueError(
            f"due.block_size is {due.block_size}, but the caches have blocks of {kv_block_size}"
        )


def ragged(lengths: Sequence[int], layers: int, heads: int, like: Tensor) -> list[Tensor]:
    """Views [layers, heads, n] of one flat float32 buffer that is not written yet."""
    flat = torch.empty(sum(lengths) * layers * heads, dtype=torch.float32, device=like.device)
    parts = flat.split([n * layers * heads for n in lengths])
    return [part.view(layers, heads, n) for part, n in zip(parts, lengths, strict=True)]


def flat(
    name: str, parts: Sequence[Tensor], lengths: Sequence[int], layers: int, heads: int
) -> Tensor:
    """What to hand a kernel as the flat buffer of these parts: the first, or a copy of all.

    Parts that a launcher returned follow each other in memory already. ValueError unless they are
    float32 [layers, heads, n]."""
    shapes = [(layers, heads, n) for n in lengths]
    if [tuple(x.shape) for x in parts] != shapes or any(x.dtype != torch.float32 for x in parts):
        raise ValueError(
            f"{name} must be float32 of shapes {shapes}, one for each request, "
            f"got {[(x.dtype, tuple(x.shape)) for x in parts]}"
        )
    addresses = [x.data_ptr() for x in parts]
    expected = accumulate((x.nbytes for x in parts[:-1]), initial=addresses[0])
    if all(x.is_contiguous() for x in parts) and addresses == list(expected):
        return parts[0]
    return torch.cat([x.flatten() for x in parts])


def _before(lengths: Iterable[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))[:-1]
