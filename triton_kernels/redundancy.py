# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""How much each key resembles the others, or newer ones, without ever holding all cosines.

`superseded` walks half the matrix, a tile at a time. `redundancy` need not: the sum of a row is one
product with the sum of all unit keys. Only what a column loses, its entry in the last row above the
threshold, needs pairs: each program owns some columns and walks the rows from the newest down until
all of them have found theirs. What rows lose is summed in fixed point, where the order does not
matter: reruns and ranks agree to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .paged import PagedLayers, load_pointer
from .requests import (
    DueRequests,
    candidates_before,
    candidates_of,
    check_layers,
    flat,
    live_tokens_of,
    load_live_keys,
    protected_of,
    ragged,
    row_of,
    unprotected_before,
)
from .signatures import Signature

SMALLEST_NORM: tl.constexpr = tl.constexpr(1e-12)
"""What `torch.nn.functional.normalize` clamps norms at."""
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal float32: what maxima are clamped at before something is divided by them."""
ONE: tl.constexpr = tl.constexpr(2.0**40)
"""1 in fixed point. A row loses at most one entry per column, so 2^22 columns fit."""
TILE = 64
"""Keys at a time."""


@triton.jit
def _inverse_norms(keys):
    """1 / |k| of each key [tokens, DIM], in float32."""
    wide = keys.to(tl.float32)
    return 1 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), SMALLEST_NORM)


@triton.jit
def _row_sums_kernel(
    key_pointers,
    key_type,
    tables,
    table_of_layer,
    numbers,
    sums,
    inverse_norms,
    losses,
    span,
    block_stride,
    head_stride,
    token_stride,
    dim_stride,
    table_width,
    heads,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each key's cosines with all others of its span, summed; its inverse norm; losses of 0.

    One program per span of keys (all keys, or a block's), layer and head, and request."""
    layers, requests = tl.num_programs(1) // heads, tl.num_programs(2)
    layer, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    request = tl.program_id(2)
    protected = protected_of(numbers, request, requests)
    count = live_tokens_of(numbers, request, requests) - protected
    first = tl.program_id(0) * span
    end = tl.minimum(first + span, count)
    which = tl.load(table_of_layer + layer) * requests + request
    table = tables + which.to(tl.int64) * table_width + protected // BLOCK_SIZE
    keys = load_pointer(key_pointers, layer, key_type) + head.to(tl.int64) * head_stride
    before = unprotected_before(numbers, request, requests)
    mine = row_of(before, count, layer, head, layers, heads)

    total = tl.zeros([DIM], tl.float32)
    for start in range(first, end, TILE):
        at = start + tl.arange(0, TILE)
        key = load_live_keys(
            keys,
            table,
            at,
            end,
            block_stride,
            token_stride,
            dim_stride,
            BLOCK_SIZE,
            HEAD_DIM,
            DIM,
        ).to(tl.float32)
        inverse = _inverse_norms(key)
        total += tl.sum(key * inverse[:, None], 0)
        tl.store(inverse_norms + mine + at, inverse, mask=at < end)
        tl.store(losses + mine + at, tl.zeros([TILE], tl.int64), mask=at < end)
    for start in range(first, end, TILE):
        at = start + tl.arange(0, TILE)
        key = load_live_keys(
            keys,
            table,
            at,
            end,
            block_stride,
            token_stride,
            dim_stride,
            BLOCK_SIZE,
            HEAD_DIM,
            DIM,
        ).to(tl.float32)
        inverse = _inverse_norms(key)
        unit = key * inverse[:, None]
        # With all keys, without itself.
        tl.store(sums + mine + at, tl.sum(unit * (total[None, :] - unit), 1), mask=at < end)


@triton.jit
def _last_similar_kernel(
    key_pointers,
    key_type,
    tables,
    table_of_layer,
    numbers,
    inverse_norms,
    losses,
    span,
    threshold,
    block_stride,
    head_stride,
    token_stride,
    dim_stride,
    table_width,
    heads,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add to the losses of the last row of each column that resembles it, within their span.

    One program per tile of columns, layer and head, and request."""
    layers, requests = tl.num_programs(1) // heads, tl.num_programs(2)
    layer, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    request = tl.program_id(2)
    protected = protected_of(numbers, request, requests)
    count = live_tokens_of(numbers, request, requests) - protected
    first = tl.program_id(0) * TILE
    if first < count:
        which = tl.load(table_of_layer + layer) * requests + request
        table = tables + which.to(tl.int64) * table_width + protected // BLOCK_SIZE
        keys = load_pointer(key_pointers, layer, key_type) + head.to(tl.int64) * head_stride
        before = unprotected_before(numbers, request, requests)
        mine = row_of(before, count, layer, head, layers, heads)

        column = first + tl.arange(0, TILE)
        column_key = load_live_keys(
            keys,
            table,
            column,
            count,
            block_stride,
            token_stride,
            dim_stride,
            BLOCK_SIZE,
            HEAD_DIM,
            DIM,
        )
        if INTERPRET:  # its dot takes the bits of bfloat16 for integers
            column_key = column_key.to(tl.float32)
        column_norm = tl.load(inverse_norms + mine + column, mask=column < count, other=0.0)
        # 1 while a column still looks for its row.
        looks = (column < count).to(tl.int32)
        oldest = first // span * span
        last = tl.minimum(first + TILE - 1, count - 1)
        end = tl.minimum((last // span + 1) * span, count)
        start = oldest + (end - 1 - oldest) // TILE * TILE
        while (start >= oldest) & (tl.sum(looks, 0) > 0):
            row = start + tl.arange(0, TILE)
            row_key = load_live_keys(
                keys,
                table,
                row,
                end,
                block_stride,
                token_stride,
                dim_stride,
                BLOCK_SIZE,
                HEAD_DIM,
                DIM,
            )
            if INTERPRET:
                row_key = row_key.to(tl.float32)
            row_norm = tl.load(inverse_norms + mine + row, mask=row < end, other=0.0)
            cosine = tl.dot(column_key, tl.trans(row_key), input_precision="tf32x3")
            cosine = cosine * column_norm[:, None] * row_norm[None, :]
            similar = (cosine > threshold) & (row[None, :] != column[:, None])
            # Padding rows have cosines of 0, which a threshold below 0 would take for similar.
            similar &= (row < end)[None, :] & (row[None, :] // span == column[:, None] // span)
            newest = tl.max(tl.where(similar, row[None, :], -1), 1)
            found = (newest >= 0) & (looks > 0)
            lost = tl.sum(tl.where(row[None, :] == newest[:, None], cosine, 0.0), 1)
            tl.atomic_add(losses + mine + newest, (lost * ONE).to(tl.int64), mask=found)
            looks = tl.where(found, 0, looks)
            start -= TILE


@triton.jit
def _superseded_kernel(
    key_pointers,
    key_type,
    tables,
    table_of_layer,
    numbers,
    found,
    block_stride,
    head_stride,
    token_stride,
    dim_stride,
    table_width,
    heads,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The largest cosine of each key to a newer one, at least 0.

    One program per tile of columns, layer and head, and request; it walks the rows from there on.
    """
    layers, requests = tl.num_programs(1) // heads, tl.num_programs(2)
    layer, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    request = tl.program_id(2)
    protected = protected_of(numbers, request, requests)
    count = live_tokens_of(numbers, request, requests) - protected
    first = tl.program_id(0) * TILE
    if first < count:
        which = tl.load(table_of_layer + layer) * requests + request
        table = tables + which.to(tl.int64) * table_width + protected // BLOCK_SIZE
        keys = load_pointer(key_pointers, layer, key_type) + head.to(tl.int64) * head_stride
        before = unprotected_before(numbers, request, requests)
        mine = row_of(before, count, layer, head, layers, heads)

        column = first + tl.arange(0, TILE)
        column_key = load_live_keys(
            keys,
            table,
            column,
            count,
            block_stride,
            token_stride,
            dim_stride,
            BLOCK_SIZE,
            HEAD_DIM,
            DIM,
        )
        if INTERPRET:  # its dot takes the bits of bfloat16 for integers
            column_key = column_key.to(tl.float32)
        column_norm = _inverse_norms(column_key)
        best = tl.zeros([TILE], tl.float32)
        for start in range(first, count, TILE):
            row = start + tl.arange(0, TILE)
            row_key = load_live_keys(
                keys,
                table,
                row,
                count,
                block_stride,
                token_stride,
                dim_stride,
                BLOCK_SIZE,
                HEAD_DIM,
                DIM,
            )
            if INTERPRET:
                row_key = row_key.to(tl.float32)
            cosine = tl.dot(column_key, tl.trans(row_key), input_precision="tf32x3")
            cosine = cosine * column_norm[:, None] * _inverse_norms(row_key)[None, :]
            # Padding rows have cosines of 0, which no result is less than.
            newer = row[None, :] > column[:, None]
            best = tl.maximum(best, tl.max(tl.where(newer, cosine, 0.0), 1))
        tl.store(found + mine + column, best, mask=column < count)


@triton.jit
def _means_kernel(numbers, sums, losses, block_size, heads, layers, TILE: tl.constexpr):
    """sums <- (sums - losses) / count, or / block_size if that is not 0."""
    request, requests = tl.program_id(1), tl.num_programs(1)
    protected = protected_of(numbers, request, requests)
    count = live_tokens_of(numbers, request, requests) - protected
    mine = unprotected_before(numbers, request, requests) * layers * heads
    # In 64 bits: all layers and heads of a long request.
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    exists = at < count.to(tl.int64) * layers * heads
    total = tl.load(sums + mine + at, mask=exists, other=0.0)
    lost = tl.load(losses + mine + at, mask=exists, other=0).to(tl.float32) * (1 / ONE)
    divisor = tl.where(block_size > 0, block_size, count)
    tl.store(sums + mine + at, (total - lost) / divisor, mask=exists)


@triton.jit
def _mix_kernel(
    numbers,
    importance,
    redundancy,
    mixed,
    score_weight,
    temperature,
    window,
    unit,
    UNITS: tl.constexpr,
    UNIT_PAD: tl.constexpr,
    TILE: tl.constexpr,
    NORMALISED: tl.constexpr,
):
    """One program per head, layer and request: softmax statistics, then one number per unit."""
    head, layer, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, layers, requests = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    protected = protected_of(numbers, request, requests)
    count = live_tokens_of(numbers, request, requests) - protected
    units = candidates_of(numbers, request, requests) // unit
    before = unprotected_before(numbers, request, requests)
    redundancy += row_of(before, count, layer, head, layers, heads)
    before = candidates_before(numbers, request, requests) // unit
    mine = row_of(before, units, layer, head, layers, heads)

    peaks = tl.full([TILE], float("-inf"), tl.float32)
    older = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, count, TILE):
        at = start + tl.arange(0, TILE)
        similarity = tl.load(redundancy + at, mask=at < count, other=float("-inf")) / temperature
        peaks = tl.maximum(peaks, similarity)
        older = tl.maximum(older, tl.where(at < count - window, similarity, float("-inf")))
    peak = tl.max(peaks, 0)
    totals = tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        at = start + tl.arange(0, TILE)
        similarity = tl.load(redundancy + at, mask=at < count, other=float("-inf")) / temperature
        totals += tl.exp(similarity - peak)
    total = tl.sum(totals, 0)
    divisor = total
    if NORMALISED:
        divisor = total * tl.maximum(tl.exp(tl.max(older, 0) - peak) / total, TINY)

    token = tl.arange(0, UNIT_PAD)
    for start in range(0, units, UNITS):
        at = start + tl.arange(0, UNITS)
        places = at[:, None] * unit + token[None, :]
        exists = (at < units)[:, None] & (token < unit)[None, :]
        similarity = tl.load(redundancy + places, mask=exists, other=float("-inf")) / temperature
        share = tl.sum(tl.exp(similarity - peak), 1) / (divisor * unit)
        important = tl.load(importance + mine + at, mask=at < units, other=0.0)
        score = score_weight * important - (1 - score_weight) * share
        tl.store(mixed + mine + at, score, mask=at < units)


def redundancy(
    layers: PagedLayers, due: DueRequests, *, threshold: float = 0.5, within_blocks: bool = False
) -> list[Tensor]:
    """`reference.redundancy` of each due request's unprotected keys, in every layer and head.

    `within_blocks`: `reference.redundancy_in_block`, of the keys of each cache block alone.
    Returns one float32 [layers, kv_heads, live_tokens - protected] per request. ValueError says
    what does not fit."""
    check_layers(due, layers.num_layers, layers.block_size)
    key, lengths = layers.keys[0], due.unprotected
    rows = layers.num_layers * layers.kv_heads
    sums = ragged(lengths, layers.num_layers, layers.kv_heads, key)
    inverse_norms = torch.empty(sum(lengths) * rows, device=key.device)
    losses = torch.empty(sum(lengths) * rows, dtype=torch.int64, device=key.device)
    longest = max(lengths)
    span = layers.block_size if within_blocks else longest
    cache = (layers.key_pointers, key, due.tables, due.table_of_layer, due.numbers)
    strides = (*key.stride(), due.tables.shape[2], layers.kv_heads)
    sizes = tiles(layers.block_size, layers.head_dim, key.element_size())
    # Whole spans: short ones would leave most of a larger tile idle.
    span_tile = min(sizes["TILE"], max(16, triton.next_power_of_2(span)))
    grid = (triton.cdiv(longest, span), rows, due.num_requests)
    _row_sums_kernel[grid](
        *cache, sums[0], inverse_norms, losses, span, *strides, **{**sizes, "TILE": span_tile}
    )
    grid = (triton.cdiv(longest, sizes["TILE"]), rows, due.num_requests)
    _last_similar_kernel[grid](
        *cache,
        inverse_norms,
        losses,
        span,
        threshold,
        *strides,
        **sizes,
        INTERPRET=triton.knobs.runtime.interpret,
    )
    _means_kernel[(triton.cdiv(longest * rows, 1024), due.num_requests)](
        due.numbers,
        sums[0],
        losses,
        layers.block_size if within_blocks else 0,
        layers.kv_heads,
        layers.num_layers,
        TILE=1024,
    )
    return sums


def superseded(layers: PagedLayers, due: DueRequests) -> list[Tensor]:
    """`reference.superseded` of each due request's unprotected keys, in every layer and head.

    Returns one float32 [layers, kv_heads, live_tokens - protected] per request. ValueError says
    what does not fit."""
    check_layers(due, layers.num_layers, layers.block_size)
    key, lengths = layers.keys[0], due.unprotected
    found = ragged(lengths, layers.num_layers, layers.kv_heads, key)
    sizes = tiles(layers.block_size, layers.head_dim, key.element_size())
    rows = layers.num_layers * layers.kv_heads
    _superseded_kernel[(triton.cdiv(max(lengths), sizes["TILE"]), rows, due.num_requests)](
        layers.key_pointers,
        key,
        due.tables,
        due.table_of_layer,
        due.numbers,
        found[0],
        *key.stride(),
        due.tables.shape[2],
        layers.kv_heads,
        **sizes,
        INTERPRET=triton.knobs.runtime.interpret,
    )
    return found


def mix_scores(
    importance: Sequence[Tensor],
    redundancy: Sequence[Tensor] | None,
    due: DueRequests,
    *,
    score_weight: float,
    temperature: float,
    unit: int,
    normalised: bool = True,
) -> list[Tensor]:
    """What `GKV.score` makes of F and of the similarities: what stays is what scores high.

    score_weight F - (1 - score_weight) R, with R the softmax of similarity / temperature over the
    unprotected live tokens, divided by its largest value among those older than the window where
    `normalised`, then the mean of a unit's tokens (`unit`: 1, or the block size). importance
    [layers, kv_heads, units] and redundancy [layers, kv_heads, live_tokens - protected] float32 for
    each request; without redundancy, or with all weight on it, importance is returned as it is.
    ValueError says what does not fit."""
    if redundancy is None or score_weight == 1.0:
        return list(importance)
    if unit not in (1, due.block_size):
        raise ValueError(f"unit must be 1 or the block size {due.block_size}, got {unit}")
    if not importance or importance[0].ndim != 3:
        raise ValueError("importance must be [layers, kv_heads, units] for each request")
    layers, heads, _ = importance[0].shape
    units = due.units(unit)
    mixed = ragged(units, layers, heads, importance[0])
    unit_pad = triton.next_power_of_2(unit)
    _mix_kernel[(heads, layers, due.num_requests)](
        due.numbers,
        flat("importance", importance, units, layers, heads),
        flat("redundancy", redundancy, due.unprotected, layers, heads),
        mixed[0],
        score_weight,
        temperature,
        due.window,
        unit,
        UNITS=max(1, 1024 // unit_pad),
        UNIT_PAD=unit_pad,
        TILE=1024,
        NORMALISED=normalised,
    )
    return mixed


def tiles(block_size: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """The sizes that the kernels over keys are compiled for."""
    dim = max(16, triton.next_power_of_2(head_dim))
    return dict(
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        DIM=dim,
        TILE=TILE if dim * itemsize <= 512 else TILE // 2,
        num_warps=4,
        num_stages=2,
    )


def _over_keys(kernel: Any, dtype: str, head_dim: int, tile: int | None) -> Signature:
    sizes = tiles(16, head_dim, 2)
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    if tile is not None:
        sizes["TILE"] = tile
    pointers = {
        "key_pointers": "*i64",
        "key_type": f"*{dtype}",
        "tables": "*i32",
        "table_of_layer": "*i32",
        "numbers": "*i32",
        "sums": "*fp32",
        "inverse_norms": "*fp32",
        "losses": "*i64",
        "found": "*fp32",
    }
    strides = ("block_stride", "head_stride", "token_stride")
    numbers = dict.fromkeys((*strides, "span", "table_width", "heads"), "i32")

    def taken(arguments: dict[str, Any]) -> dict[str, Any]:
        """Those that this kernel has."""
        return {name: x for name, x in arguments.items() if name in kernel.arg_names}

    return Signature(
        kernel=kernel,
        name=f"{dtype} d{head_dim} tiles of {sizes['TILE']}",
        signature=taken({**pointers, **numbers, "threshold": "fp32"}),
        constexprs=taken({**sizes, "dim_stride": 1, "INTERPRET": False}),
        divisible_by_16=(*taken(pointers), *strides),
        num_warps=warps,
        num_stages=stages,
    )


def _mixing(unit: int) -> Signature:
    pointers = {
        "numbers": "*i32",
        "importance": "*fp32",
        "redundancy": "*fp32",
        "mixed": "*fp32",
    }
    constants: dict[str, Any] = {
        "UNITS": 1024 // unit,
        "UNIT_PAD": unit,
        "TILE": 1024,
        "NORMALISED": True,
    }
    return Signature(
        kernel=_mix_kernel,
        name=f"units of {unit}",
        signature={
            **pointers,
            **dict.fromkeys(("score_weight", "temperature"), "fp32"),
            "window": "i32",
            **({} if unit == 1 else {"unit": "i32"}),
        },
        constexprs={**constants, **({"unit": 1} if unit == 1 else {})},
        divisible_by_16=tuple(pointers),
    )


SIGNATURES = [
    *(
        _over_keys(kernel, dtype, head_dim, tile)
        for dtype in ("bf16", "fp16")
        for head_dim in (64, 128)
        for kernel, tile in (
            (_row_sums_kernel, None),
            (_row_sums_kernel, 16),
            (_last_similar_kernel, None),
            (_superseded_kernel, None),
        )
    ),
    _over_keys(_last_similar_kernel, "bf16", 256, None),
    Signature(
        kernel=_means_kernel,
        name="any",
        signature={
            "numbers": "*i32",
            "sums": "*fp32",
            "losses": "*i64",
            **dict.fromkeys(("block_size", "heads", "layers"), "i32"),
        },
        constexprs={"TILE": 1024},
        divisible_by_16=("numbers", "sums", "losses", "block_size"),
    ),
    _mixing(1),
    _mixing(16),
]
