# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Copies the queries that the rings keep out of a step's batch: one launch per layer.

One program per token; those without a place leave at once. It runs inside CUDA graphs, so which
tokens have places is read from device memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .requests import check_int32
from .signatures import Signature


@triton.jit
def _store_kernel(
    queries,
    places,
    ring,
    token_stride,
    head_stride,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places + token).to(tl.int64)
    if place >= 0:
        source = queries + token * token_stride
        target = ring + place * (HEADS * HEAD_DIM)
        dim = tl.arange(0, DIM)
        for start in range(0, HEADS, HEADS_TILE):
            head = start + tl.arange(0, HEADS_TILE)
            exists = (head < HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
            query = tl.load(source + head[:, None] * head_stride + dim[None, :], mask=exists)
            tl.store(target + head[:, None] * HEAD_DIM + dim[None, :], query, mask=exists)


def store_window_queries(queries: Tensor, places: Tensor, ring: Tensor) -> None:
    """ring[places[i]] = queries[i] for each token i that has a place, -1 saying it has none.

    queries [tokens, query_heads, head_dim], of which the last dimension is dense, such as the part
    of a fused projection; places int32, at least as many as tokens; ring
    [places, query_heads, head_dim], contiguous, of the same type. Writes the ring. ValueError names
    what does not fit."""
    if queries.ndim != 3 or queries.stride(2) != 1:
        raise ValueError(
            "store_window_queries: queries must be [tokens, query_heads, head_dim] with a dense "
            f"last dimension, got {tuple(queries.shape)} with strides {queries.stride()}"
        )
    tokens, heads, head_dim = queries.shape
    if ring.ndim != 3 or ring.shape[1:] != queries.shape[1:] or not ring.is_contiguous():
        raise ValueError(
            f"store_window_queries: ring must be contiguous [places, {heads}, {head_dim}], "
            f"got {tuple(ring.shape)}"
        )
    if ring.dtype != queries.dtype or ring.device != queries.device:
        raise ValueError(
            f"store_window_queries: ring must be {queries.dtype} on {queries.device}, "
            f"got {ring.dtype} on {ring.device}"
        )
    check_int32("store_window_queries: places", places, 1, queries.device)
    if places.shape[0] < tokens:
        raise ValueError(
            f"store_window_queries: places must have at least {tokens} entries, "
            f"got {places.shape[0]}"
        )
    if not tokens:
        return
    _store_kernel[(tokens,)](
        queries,
        places,
        ring,
        queries.stride(0),
        queries.stride(1),
        **_sizes(heads, head_dim),
        num_warps=4,
    )


def _sizes(heads: int, head_dim: int) -> dict[str, int]:
    """What the kernel is compiled for: at most 4096 elements at a time."""
    dim = triton.next_power_of_2(head_dim)
    return dict(
        HEADS=heads,
        HEADS_TILE=max(1, min(triton.next_power_of_2(heads), 4096 // dim)),
        HEAD_DIM=head_dim,
        DIM=dim,
    )


def _signature(dtype: str, heads: int, head_dim: int) -> Signature:
    return Signature(
        kernel=_store_kernel,
        name=f"{dtype} {heads} heads d{head_dim}",
        signature={
            "queries": f"*{dtype}",
            "places": "*i32",
            "ring": f"*{dtype}",
            "token_stride": "i32",
            "head_stride": "i32",
        },
        constexprs=_sizes(heads, head_dim),
        divisible_by_16=("queries", "places", "ring", "token_stride", "head_stride"),
    )


SIGNATURES = [
    _signature(dtype, heads, head_dim)
    for dtype in ("bf16", "fp16")
    for heads, head_dim in ((32, 128), (64, 128), (14, 64))
]
