# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Adds the attention of a step's queries to what each cached token got before: two launches.

The first finds the log-sum-exp of each query, the second sums what its programs' own keys get from
all queries of their row, always in the same order. Lengths are read from device memory and grids
come from the shapes of buffers, so that both may be part of a CUDA graph."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .requests import check_int32, load_live_keys
from .score import attention_logits
from .signatures import Signature

PROGRAMS = 1024
"""How many programs a launch is split into where there are fewer rows and heads than that."""


@triton.jit
def _load_queries(
    queries,
    member,
    count,
    token_stride,
    head_stride,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The group's heads of some queries, [ROWS, DIM], and which of these rows there are."""
    head = tl.arange(0, ROWS) % GROUP_PAD
    dim = tl.arange(0, DIM)
    exists = (head < GROUP) & (member < count)
    rows = member.to(tl.int64) * token_stride + head * head_stride
    mask = exists[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(queries + rows[:, None] + dim[None, :], mask=mask, other=0.0), exists


@triton.jit(do_not_specialize=["table_stride"])
def _log_sums_kernel(
    queries,
    keys,
    log_sums,
    live_table,
    live_lens,
    query_starts,
    protected,
    scale,
    softcap,
    table_stride,
    query_token_stride,
    query_head_stride,
    block_stride,
    head_stride,
    token_stride,
    dim_stride,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    request = tl.program_id(2).to(tl.int64)
    first = tl.load(query_starts + request).to(tl.int64)
    count = (tl.load(query_starts + request + 1) - first).to(tl.int32)
    if tl.load(protected + request) < 0:
        count = 0
    old = tl.load(live_lens + request) - count
    table = live_table + request * table_stride
    queries += first * query_token_stride + head * GROUP * query_head_stride
    keys += head * head_stride
    log_sums += first * heads * GROUP + head * GROUP
    row = tl.arange(0, ROWS)
    step: tl.constexpr = ROWS // GROUP_PAD
    for start in range(tl.program_id(0) * step, count, tl.num_programs(0) * step):
        member = start + row // GROUP_PAD
        query, exists = _load_queries(
            queries,
            member,
            count,
            query_token_stride,
            query_head_stride,
            GROUP,
            GROUP_PAD,
            HEAD_DIM,
            DIM,
            ROWS,
        )
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        seen = old + tl.minimum(start + step, count)
        for key_start in range(0, seen, KEYS):
            at = key_start + tl.arange(0, KEYS)
            key = load_live_keys(
                keys,
                table,
                at,
                seen,
                block_stride,
                token_stride,
                dim_stride,
                BLOCK_SIZE,
                HEAD_DIM,
                DIM,
            )
            logits = attention_logits(query, tl.trans(key), scale, softcap, SOFTCAP, INTERPRET)
            logits = tl.where(at[None, :] <= (old + member)[:, None], logits, float("-inf"))
            higher = tl.maximum(peak, tl.max(logits, 1))
            total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
            peak = higher
        place = member.to(tl.int64) * (heads * GROUP) + row % GROUP_PAD
        tl.store(log_sums + place, peak + tl.log2(total), mask=exists)


@triton.jit(do_not_specialize=["table_stride"])
def _mass_kernel(
    queries,
    keys,
    log_sums,
    plane,
    live_table,
    live_lens,
    query_starts,
    protected,
    scale,
    softcap,
    table_stride,
    query_token_stride,
    query_head_stride,
    block_stride,
    head_stride,
    token_stride,
    dim_stride,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    request = tl.program_id(2).to(tl.int64)
    first = tl.load(query_starts + request).to(tl.int64)
    count = (tl.load(query_starts + request + 1) - first).to(tl.int32)
    leading = tl.load(protected + request)
    live = tl.load(live_lens + request)
    old = live - count
    # Tokens before this one keep what they have.
    changed = tl.minimum(leading, old)
    if leading < 0:
        live = 0
    table = live_table + request * table_stride
    queries += first * query_token_stride + head * GROUP * query_head_stride
    keys += head * head_stride
    log_sums += first * heads * GROUP + head * GROUP
    row = tl.arange(0, ROWS)
    step: tl.constexpr = ROWS // GROUP_PAD
    begin = tl.maximum(changed, 0) // KEYS + tl.program_id(0)
    for start in range(begin * KEYS, live, tl.num_programs(0) * KEYS):
        at = start + tl.arange(0, KEYS)
        key = load_live_keys(
            keys,
            table,
            at,
            live,
            block_stride,
            token_stride,
            dim_stride,
            BLOCK_SIZE,
            HEAD_DIM,
            DIM,
        )
        mass = tl.zeros([KEYS], tl.float32)
        # Older queries do not see as far.
        for query_start in range(tl.maximum(start - old, 0) // step * step, count, step):
            member = query_start + row // GROUP_PAD
            query, exists = _load_queries(
                queries,
                member,
                count,
                query_token_stride,
                query_head_stride,
                GROUP,
                GROUP_PAD,
                HEAD_DIM,
                DIM,
                ROWS,
            )
            place = member.to(tl.int64) * (heads * GROUP) + row % GROUP_PAD
            log_sum = tl.load(log_sums + place, mask=exists, other=0.0)
            logits = attention_logits(key, tl.trans(query), scale, softcap, SOFTCAP, INTERPRET)
            attends = exists[None, :] & (at[:, None] <= (old + member)[None, :])
            mass += tl.sum(tl.where(attends, tl.exp2(logits - log_sum[None, :]), 0.0), 1)
        written = (at >= changed) & (at < live)
        block = tl.load(table + at // BLOCK_SIZE, mask=written, other=0).to(tl.int64)
        number = plane + (block * heads + head) * BLOCK_SIZE + at % BLOCK_SIZE
        before = tl.load(number, mask=written & (at < old), other=0.0)
        tl.store(number, before + tl.where(at >= leading, mass, 0.0), mask=written)


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    plane: Tensor,
    live_table: Tensor,
    live_lens: Tensor,
    query_starts: Tensor,
    protected: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> None:
    """Add the attention of this step's queries to the plane of one layer; new tokens start from 0.

    queries [tokens, query_heads, head_dim] with a dense last dimension, keys a view
    [num_blocks, kv_heads, block_size, head_dim] of the cache, which has those of this step, plane
    [num_blocks, kv_heads, block_size] float32. int32: live_table [requests, blocks], live_lens
    [requests], query_starts [requests + 1] and protected [requests], the leading tokens of a
    request that take no part in the sums (they do in the softmax), -1 to leave it alone. Requests
    must not share blocks that change. ValueError names what does not fit."""
    if keys.ndim != 4:
        raise ValueError(
            "attention_mass: keys must be [num_blocks, kv_heads, block_size, head_dim], "
            f"got {tuple(keys.shape)}"
        )
    num_blocks, kv_heads, block_size, head_dim = keys.shape
    if queries.ndim != 3 or queries.shape[2] != head_dim or queries.stride(2) != 1:
        raise ValueError(
            f"attention_mass: queries must be [tokens, query_heads, {head_dim}] with a dense last "
            f"dimension, got {tuple(queries.shape)} with strides {queries.stride()}"
        )
    tokens, query_heads, _ = queries.shape
    if query_heads % kv_heads or queries.dtype != keys.dtype or queries.device != keys.device:
        raise ValueError(
            f"attention_mass: queries must be {keys.dtype} on {keys.device} with a multiple of "
            f"{kv_heads} heads, got {queries.dtype} on {queries.device} with {query_heads}"
        )
    shape = (num_blocks, kv_heads, block_size)
    if plane.dtype != torch.float32 or plane.shape != shape or not plane.is_contiguous():
        raise ValueError(
            f"attention_mass: plane must be contiguous float32 {list(shape)}, "
            f"got {plane.dtype} {tuple(plane.shape)}"
        )
    if live_table.dtype != torch.int32 or live_table.ndim != 2 or live_table.stride(1) != 1:
        raise ValueError(
            "attention_mass: live_table must be int32 [requests, blocks] with dense rows, "
            f"got {live_table.dtype} {tuple(live_table.shape)}"
        )
    requests = live_table.shape[0]
    for name, numbers, size in (
        ("live_lens", live_lens, requests),
        ("query_starts", query_starts, requests + 1),
        ("protected", protected, requests),
    ):
        check_int32(f"attention_mass: {name}", numbers, 1, keys.device)
        if numbers.shape[0] != size:
            raise ValueError(f"attention_mass: {name} must be [{size}], got {tuple(numbers.shape)}")
    if not tokens or not requests:
        return
    sizes = _sizes(query_heads // kv_heads, block_size, head_dim, keys.element_size())
    sizes |= _rows(sizes["GROUP_PAD"], sizes["DIM"], keys.element_size(), tokens > 4 * requests)
    options = dict(
        SOFTCAP=softcap != 0, INTERPRET=triton.knobs.runtime.interpret, num_warps=4, num_stages=2
    )
    log_sums = torch.empty(tokens, query_heads, dtype=torch.float32, device=keys.device)
    tail = (
        live_table,
        live_lens,
        query_starts,
        protected,
        scale,
        softcap,
        live_table.stride(0),
        queries.stride(0),
        queries.stride(1),
        *keys.stride(),
    )
    wanted = triton.cdiv(PROGRAMS, requests * kv_heads)
    of_queries = triton.cdiv(tokens, sizes["ROWS"] // sizes["GROUP_PAD"])
    of_keys = triton.cdiv(live_table.shape[1] * block_size, sizes["KEYS"])
    _log_sums_kernel[(min(wanted, of_queries), kv_heads, requests)](
        queries, keys, log_sums, *tail, **sizes, **options
    )
    _mass_kernel[(min(wanted, of_keys), kv_heads, requests)](
        queries, keys, log_sums, plane, *tail, **sizes, **options
    )


def _sizes(group: int, block_size: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """What the kernels are compiled for, but for the rows of a tile of queries."""
    dim = max(16, triton.next_power_of_2(head_dim))
    return dict(
        GROUP=group,
        GROUP_PAD=triton.next_power_of_2(group),
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        DIM=dim,
        KEYS=64 if dim * itemsize <= 256 else 32,
    )


def _rows(group_pad: int, dim: int, itemsize: int, prefill: bool) -> dict[str, int]:
    """Queries times heads of a tile: the least that a product takes, or more for many queries."""
    return dict(ROWS=max(16, group_pad, (64 if dim * itemsize <= 256 else 32) if prefill else 16))


def _signatures(dtype: str, head_dim: int, group: int, prefill: bool) -> list[Signature]:
    pointers = (
        "queries",
        "keys",
        "log_sums",
        "live_table",
        "live_lens",
        "query_starts",
        "protected",
    )
    strides = (
        "query_token_stride",
        "query_head_stride",
        "block_stride",
        "head_stride",
        "token_stride",
    )
    types = {name: "*i32" for name in pointers}
    types |= {"queries": f"*{dtype}", "keys": f"*{dtype}", "log_sums": "*fp32"}
    types |= {"scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("table_stride", *strides), "i32")
    sizes = _sizes(group, 16, head_dim, 2)
    constants = sizes | _rows(sizes["GROUP_PAD"], sizes["DIM"], 2, prefill)
    constants |= {"dim_stride": 1, "SOFTCAP": False, "INTERPRET": False}
    name = f"{dtype} d{head_dim} group {group} {'prefill' if prefill else 'decode'}"
    return [
        Signature(
            kernel=_log_sums_kernel,
            name=name,
            signature=types,
            constexprs=constants,
            divisible_by_16=(*pointers, *strides),
            num_stages=2,
        ),
        Signature(
            kernel=_mass_kernel,
            name=name,
            signature=types | {"plane": "*fp32"},
            constexprs=constants,
            divisible_by_16=(*pointers, *strides, "plane"),
            num_stages=2,
        ),
    ]


SIGNATURES = [
    signature
    for dtype, head_dim, group in (
        ("bf16", 128, 4),
        ("bf16", 128, 8),
        ("bf16", 64, 7),
        ("fp16", 128, 4),
    )
    for prefill in (False, True)
    for signature in _signatures(dtype, head_dim, group, prefill)
]
