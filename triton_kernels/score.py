# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""How much the window attends to each older token, and its decayed maximum or sum: one launch.

One program per request, layer and KV head. It reads the keys twice: for the softmax statistics of
its query rows (a tile is [rows, keys], reduced along the keys), then for the scores ([keys, rows],
reduced along the rows: group first, then window), so both reductions stay inside a thread."""

from __future__ import annotations

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
    check_int32,
    check_layers,
    live_tokens_of,
    load_live_keys,
    older_before,
    protected_of,
    ragged,
    remembered_of,
    row_of,
)
from .signatures import Signature

FORMS = {"max_probability": 0, "max_logit": 1, "mean_probability": 2}
"""`gkv_vllm.ops.reference.LOCAL_SCORE_FORMS`, by the number that the kernel knows."""
NO_HISTORY, BY_BLOCK, BY_TOKEN = 0, 1, 2
MAX_LOGIT: tl.constexpr = tl.constexpr(1)
MEAN_PROBABILITY: tl.constexpr = tl.constexpr(2)
IS_BY_BLOCK: tl.constexpr = tl.constexpr(BY_BLOCK)
IS_BY_TOKEN: tl.constexpr = tl.constexpr(BY_TOKEN)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal float32: what maxima are clamped at before something is divided by them."""


@triton.jit
def attention_logits(left, right, scale, softcap, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr):
    """Attention logits in units of log 2, for `exp2`."""
    if INTERPRET:  # its dot takes the bits of bfloat16 for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    # Of float32 three TF32 products, nearly as exact; of the 16-bit types one, exact.
    logits = tl.dot(left, right, input_precision="tf32x3") * scale
    if SOFTCAP:
        # tanh; where exp2 overflows the quotient is 0, as it should be.
        logits = softcap * (1 - 2 / (tl.exp2(logits * (2 * LOG2_E) / softcap) + 1))
    return logits * LOG2_E


@triton.jit
def _score_window(
    queries,
    keys,
    table,
    scores,
    live,
    scale,
    softcap,
    block_stride,
    token_stride,
    dim_stride,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    FORM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Write the local scores of the tokens older than the window; return the largest.

    `queries` [GROUP, WINDOW, HEAD_DIM] of one KV head. Rows of a tile are `WINDOW_TILE` queries
    with their `GROUP_PAD` heads; longer windows are done in turns that add up in `scores`."""
    older = live - WINDOW
    row = tl.arange(0, WINDOW_TILE * GROUP_PAD)
    dim = tl.arange(0, DIM)
    offsets = tl.arange(0, KEYS)
    in_group = row % GROUP_PAD < GROUP
    largest = tl.zeros([KEYS], tl.float32)
    for turn in range((WINDOW + WINDOW_TILE - 1) // WINDOW_TILE):
        member = turn * WINDOW_TILE + row // GROUP_PAD
        exists = in_group & (member < WINDOW)
        query = tl.load(
            queries + ((row % GROUP_PAD) * WINDOW + member)[:, None] * HEAD_DIM + dim[None, :],
            mask=exists[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        newest = tl.minimum(older + member, live - 1)
        if FORM == MAX_LOGIT:
            peak = tl.full([WINDOW_TILE], float("-inf"), tl.float32)
            total = tl.zeros([WINDOW_TILE], tl.float32)
            attended = older
        else:
            peak = tl.full([WINDOW_TILE * GROUP_PAD], float("-inf"), tl.float32)
            total = tl.zeros([WINDOW_TILE * GROUP_PAD], tl.float32)
            attended = live

        for start in range(0, attended, KEYS):
            at = start + offsets
            key = load_live_keys(
                keys,
                table,
                at,
                attended,
                block_stride,
                token_stride,
                dim_stride,
                BLOCK_SIZE,
                HEAD_DIM,
                DIM,
            )
            logits = attention_logits(query, tl.trans(key), scale, softcap, SOFTCAP, INTERPRET)
            if FORM == MAX_LOGIT:
                logits = tl.where(in_group[:, None], logits, float("-inf"))
                if GROUP_PAD > 1:
                    logits = tl.max(tl.reshape(logits, [WINDOW_TILE, GROUP_PAD, KEYS]), 1)
                logits = tl.where((at < older)[None, :], logits, float("-inf"))
            else:
                logits = tl.where(at[None, :] <= newest[:, None], logits, float("-inf"))
            higher = tl.maximum(peak, tl.max(logits, 1))
            total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
            peak = higher
        log_total = peak + tl.log2(total)

        transposed = tl.trans(query)
        for start in range(0, older, KEYS):
            at = start + offsets
            key = load_live_keys(
                keys,
                table,
                at,
                older,
                block_stride,
                token_stride,
                dim_stride,
                BLOCK_SIZE,
                HEAD_DIM,
                DIM,
            )
            logits = attention_logits(key, transposed, scale, softcap, SOFTCAP, INTERPRET)
            if FORM == MAX_LOGIT:
                logits = tl.where(in_group[None, :], logits, float("-inf"))
                if GROUP_PAD > 1:
                    logits = tl.max(tl.reshape(logits, [KEYS, WINDOW_TILE, GROUP_PAD]), 2)
                queried = turn * WINDOW_TILE + tl.arange(0, WINDOW_TILE) < WINDOW
                by_query = tl.where(queried[None, :], tl.exp2(logits - log_total[None, :]), 0.0)
            else:
                by_query = tl.where(exists[None, :], tl.exp2(logits - log_total[None, :]), 0.0)
                if GROUP_PAD > 1:
                    by_query = tl.reshape(by_query, [KEYS, WINDOW_TILE, GROUP_PAD])
                    if FORM == MEAN_PROBABILITY:
                        by_query = tl.sum(by_query, 2) / GROUP
                    else:
                        by_query = tl.max(by_query, 2)
            score = tl.sum(by_query, 1) / WINDOW
            if WINDOW > WINDOW_TILE:
                score += tl.load(scores + at, mask=(at < older) & (turn > 0), other=0.0)
            tl.store(scores + at, score, mask=at < older)
            # Sums only grow, so the largest of the last turn is the largest of all.
            largest = tl.maximum(largest, tl.where(at < older, score, 0.0))
        # What one thread wrote another one reads: in the next turn, or in the caller.
        tl.debug_barrier()
    return tl.max(largest, 0)


@triton.jit
def _scores_kernel(
    queries,
    key_pointers,
    key_type,
    tables,
    table_of_layer,
    numbers,
    scores,
    remembered_scores,
    history,
    planes,
    slots,
    logical_blocks,
    scale,
    softcap,
    alpha,
    block_stride,
    head_stride,
    token_stride,
    dim_stride,
    table_width,
    logical_width,
    history_width,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    UNITS: tl.constexpr,
    FORM: tl.constexpr,
    HISTORY: tl.constexpr,
    NORMALISED: tl.constexpr,
    SUMMED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    head, layer, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, layers, requests = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    live = live_tokens_of(numbers, request, requests)
    older = live - WINDOW
    which = tl.load(table_of_layer + layer) * requests + request
    row = (layer * requests + request).to(tl.int64) * heads + head
    keys = load_pointer(key_pointers, layer, key_type) + head.to(tl.int64) * head_stride
    table = tables + which.to(tl.int64) * table_width
    before = older_before(numbers, request, requests)
    mine = scores + row_of(before, older, layer, head, layers, heads)
    largest = _score_window(
        queries + row * (GROUP * WINDOW * HEAD_DIM),
        keys,
        table,
        mine,
        live,
        scale,
        softcap,
        block_stride,
        token_stride,
        dim_stride,
        GROUP,
        GROUP_PAD,
        WINDOW,
        WINDOW_TILE,
        BLOCK_SIZE,
        HEAD_DIM,
        DIM,
        KEYS,
        FORM,
        SOFTCAP,
        INTERPRET,
    )

    divisor = tl.maximum(largest, TINY) if NORMALISED else 1.0
    candidates = candidates_of(numbers, request, requests)
    remembered = remembered_of(numbers, request, requests)
    protected = protected_of(numbers, request, requests)
    before = candidates_before(numbers, request, requests)
    if HISTORY == IS_BY_BLOCK:
        blocks = candidates // BLOCK_SIZE
        out = remembered_scores + row_of(before // BLOCK_SIZE, blocks, layer, head, layers, heads)
        slot = tl.load(slots + request).to(tl.int64)
        history += ((slot * layers + layer) * heads + head) * history_width
        logical_blocks += which.to(tl.int64) * logical_width
        token = tl.arange(0, BLOCK_PAD)
        for start in range(0, blocks, UNITS):
            unit = start + tl.arange(0, UNITS)
            at = protected + unit[:, None] * BLOCK_SIZE + token[None, :]
            exists = (unit < blocks)[:, None] & (token < BLOCK_SIZE)[None, :]
            present = tl.max(tl.load(mine + at, mask=exists, other=0.0), 1) / divisor
            place = history + tl.load(logical_blocks + unit, mask=unit < blocks, other=0)
            known = unit < tl.minimum(blocks, remembered)
            past = tl.load(place, mask=known, other=0.0)
            score = alpha * past + present if SUMMED else tl.maximum(alpha * past, present)
            tl.store(place, score, mask=unit < blocks)
            tl.store(out + unit, score, mask=unit < blocks)
    elif HISTORY == IS_BY_TOKEN:
        out = remembered_scores + row_of(before, candidates, layer, head, layers, heads)
        plane = load_pointer(planes, layer, scores)
        for start in range(0, candidates, UNITS):
            unit = start + tl.arange(0, UNITS)
            at = protected + unit
            exists = unit < candidates
            present = tl.load(mine + at, mask=exists, other=0.0) / divisor
            block = tl.load(table + at // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
            place = plane + (block * heads + head) * BLOCK_SIZE + at % BLOCK_SIZE
            known = unit < tl.minimum(candidates, remembered)
            past = tl.load(place, mask=known, other=0.0)
            score = alpha * past + present if SUMMED else tl.maximum(alpha * past, present)
            tl.store(place, score, mask=exists)
            tl.store(out + unit, score, mask=exists)


def local_scores(
    queries: Tensor,
    layers: PagedLayers,
    due: DueRequests,
    *,
    scale: float,
    softcap: float = 0.0,
    form: str = "max_probability",
) -> list[Tensor]:
    """`reference.local_scores` of every due request in every layer.

    queries [layers, requests, query_heads, window, head_dim] in the type of the caches, oldest
    first. Returns one float32 [layers, kv_heads, live_tokens - window] per request. ValueError says
    what does not fit."""
    if form not in FORMS:
        raise ValueError(f"local_scores: unknown form '{form}'; valid: {', '.join(FORMS)}")
    scores = ragged(due.older, layers.num_layers, layers.kv_heads, queries)
    _launch(queries, layers, due, scores, scale, softcap, form=FORMS[form])
    return scores


def score_blocks(
    queries: Tensor,
    layers: PagedLayers,
    due: DueRequests,
    history: Tensor,
    slots: Tensor,
    logical_blocks: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    alpha: float,
    normalised: bool = True,
    summed: bool = False,
) -> list[Tensor]:
    """The G-KV score F of each candidate block, before redundancy; renews the history in place.

    With S the best local score of a block, divided by the largest of the tokens older than the
    window where `normalised`: F = max(alpha * past, S), or where `summed` alpha * past + S; the
    past of units that are not remembered is 0. history [slots, layers, kv_heads, blocks] float32
    holds F by logical block; slots [requests] int32, no two the same; logical_blocks
    [tables, requests, candidate blocks] int32. Returns one float32
    [layers, kv_heads, candidate blocks] per request. ValueError says what does not fit."""
    shape = (layers.num_layers, layers.kv_heads)
    if (
        history.dtype != torch.float32
        or history.ndim != 4
        or history.shape[1:3] != shape
        or not history.is_contiguous()
    ):
        raise ValueError(
            f"history must be contiguous float32 [slots, {shape[0]}, {shape[1]}, blocks], "
            f"got {history.dtype} {tuple(history.shape)}"
        )
    check_int32("slots", slots, 1, layers.device)
    if slots.shape[0] != due.num_requests:
        raise ValueError(f"slots must be [{due.num_requests}], got {tuple(slots.shape)}")
    check_int32("logical_blocks", logical_blocks, 3, layers.device)
    units = due.units(due.block_size)
    if logical_blocks.shape[:2] != due.tables.shape[:2] or logical_blocks.shape[2] < max(units):
        raise ValueError(
            f"logical_blocks must be [{due.tables.shape[0]}, {due.num_requests}, "
            f"at least {max(units)}], got {tuple(logical_blocks.shape)}"
        )
    return _remember(
        queries,
        layers,
        due,
        units,
        scale,
        softcap,
        alpha,
        normalised,
        summed,
        kind=BY_BLOCK,
        history=history,
        slots=slots,
        logical_blocks=logical_blocks,
    )


def score_tokens(
    queries: Tensor,
    layers: PagedLayers,
    due: DueRequests,
    planes: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    alpha: float,
    normalised: bool = True,
    summed: bool = False,
) -> list[Tensor]:
    """`score_blocks` for each candidate token, with its past in a plane beside the cache.

    planes [layers] int64: the address of each layer's plane, a contiguous float32
    [num_blocks, kv_heads, block_size] (`paged.pointers`). Returns one float32
    [layers, kv_heads, candidate tokens] per request. ValueError says what does not fit."""
    if planes.dtype != torch.int64 or planes.shape != (layers.num_layers,):
        raise ValueError(
            f"planes must be int64 [{layers.num_layers}], the addresses of the layers' planes, "
            f"got {planes.dtype} {tuple(planes.shape)}"
        )
    return _remember(
        queries,
        layers,
        due,
        due.units(1),
        scale,
        softcap,
        alpha,
        normalised,
        summed,
        kind=BY_TOKEN,
        planes=planes,
    )


def _remember(
    queries: Tensor,
    layers: PagedLayers,
    due: DueRequests,
    units: list[int],
    scale: float,
    softcap: float,
    alpha: float,
    normalised: bool,
    summed: bool,
    *,
    kind: int,
    **where: Any,
) -> list[Tensor]:
    local = ragged(due.older, layers.num_layers, layers.kv_heads, queries)
    scores = ragged(units, layers.num_layers, layers.kv_heads, queries)
    _launch(
        queries,
        layers,
        due,
        local,
        scale,
        softcap,
        kind=kind,
        remembered_scores=scores,
        alpha=alpha,
        normalised=normalised,
        summed=summed,
        **where,
    )
    return scores


def _launch(
    queries: Tensor,
    layers: PagedLayers,
    due: DueRequests,
    scores: list[Tensor],
    scale: float,
    softcap: float,
    *,
    form: int = 0,
    kind: int = NO_HISTORY,
    remembered_scores: list[Tensor] | None = None,
    alpha: float = 0.0,
    normalised: bool = True,
    summed: bool = False,
    history: Tensor | None = None,
    planes: Tensor | None = None,
    slots: Tensor | None = None,
    logical_blocks: Tensor | None = None,
) -> None:
    check_layers(due, layers.num_layers, layers.block_size)
    shape = (layers.num_layers, due.num_requests, due.window, layers.head_dim)
    if queries.ndim != 5 or (*queries.shape[:2], *queries.shape[3:]) != shape:
        raise ValueError(
            f"queries must be [{shape[0]}, {shape[1]}, query_heads, {shape[2]}, {shape[3]}], "
            f"got {tuple(queries.shape)}"
        )
    key = layers.keys[0]
    if queries.shape[2] % layers.kv_heads or queries.dtype != key.dtype:
        raise ValueError(
            f"queries must be {key.dtype} with a multiple of {layers.kv_heads} heads, "
            f"got {queries.dtype} with {queries.shape[2]}"
        )
    if not queries.is_contiguous():
        raise ValueError("queries must be contiguous")
    group = queries.shape[2] // layers.kv_heads
    grid = (layers.kv_heads, layers.num_layers, due.num_requests)
    _scores_kernel[grid](
        queries,
        layers.key_pointers,
        key,
        due.tables,
        due.table_of_layer,
        due.numbers,
        scores[0],
        None if remembered_scores is None else remembered_scores[0],
        history,
        planes,
        slots,
        logical_blocks,
        scale,
        softcap,
        alpha,
        *key.stride(),
        due.tables.shape[2],
        0 if logical_blocks is None else logical_blocks.shape[2],
        0 if history is None else history.shape[3],
        WINDOW=due.window,
        UNITS=units_at_once(kind, due.block_size),
        FORM=form,
        HISTORY=kind,
        NORMALISED=normalised,
        SUMMED=summed,
        SOFTCAP=softcap != 0,
        INTERPRET=triton.knobs.runtime.interpret,
        **tiles(group, due.window, layers.block_size, layers.head_dim, key.element_size()),
    )


def tiles(group: int, window: int, block_size: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """The sizes that the kernel is compiled for, and its warps and stages.

    A tile of queries or of keys takes at most 32 KiB of shared memory."""
    power = triton.next_power_of_2
    dim = max(16, power(head_dim))
    rows = max(16, min(128, 32768 // (dim * itemsize)))
    group_pad = power(group)
    window_tile = max(1, min(power(window), rows // group_pad), 16 // group_pad)
    return dict(
        GROUP=group,
        GROUP_PAD=group_pad,
        WINDOW_TILE=window_tile,
        BLOCK_SIZE=block_size,
        BLOCK_PAD=power(block_size),
        HEAD_DIM=head_dim,
        DIM=dim,
        KEYS=64 if dim * itemsize <= 256 else 32,
        num_warps=4 if itemsize < 4 else 8,
        num_stages=2,
    )


def units_at_once(kind: int, block_size: int) -> int:
    """How many units the history is renewed of at a time: 1024 tokens' worth."""
    return 1024 if kind == BY_TOKEN else max(1, 1024 // triton.next_power_of_2(block_size))


def _signature(
    dtype: str, group: int, head_dim: int, window: int, form: str, kind: int, summed: bool = False
) -> Signature:
    sizes = tiles(group, window, 16, head_dim, 4 if dtype == "fp32" else 2)
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    pointers = {
        "queries": f"*{dtype}",
        "key_pointers": "*i64",
        "key_type": f"*{dtype}",
        "tables": "*i32",
        "table_of_layer": "*i32",
        "numbers": "*i32",
        "scores": "*fp32",
    }
    where = {
        NO_HISTORY: {},
        BY_BLOCK: {"history": "*fp32", "slots": "*i32", "logical_blocks": "*i32"},
        BY_TOKEN: {"planes": "*i64"},
    }[kind]
    if kind != NO_HISTORY:
        where = {"remembered_scores": "*fp32", **where}
    optional = ("remembered_scores", "history", "planes", "slots", "logical_blocks")
    strides = ("block_stride", "head_stride", "token_stride")
    widths = ("table_width", "logical_width", "history_width")
    return Signature(
        kernel=_scores_kernel,
        name=f"{dtype} d{head_dim} group {group} window {window} {form} "
        + ("local", "blocks", "tokens")[kind]
        + (" summed" if summed else ""),
        signature={
            **pointers,
            **where,
            **dict.fromkeys(("scale", "softcap", "alpha"), "fp32"),
            **dict.fromkeys(strides + widths, "i32"),
        },
        constexprs={
            **dict.fromkeys(set(optional) - set(where)),
            **sizes,
            "dim_stride": 1,
            "WINDOW": window,
            "UNITS": units_at_once(kind, 16),
            "FORM": FORMS[form],
            "HISTORY": kind,
            "NORMALISED": True,
            "SUMMED": summed,
            "SOFTCAP": False,
            "INTERPRET": False,
        },
        divisible_by_16=(*pointers, *where, *strides),
        num_warps=warps,
        num_stages=stages,
    )


SIGNATURES = [
    *(
        _signature(dtype, group, head_dim, 16, "max_probability", kind)
        for dtype in ("bf16", "fp16")
        for group, head_dim in ((4, 128), (8, 128), (7, 64))
        for kind in (BY_BLOCK, BY_TOKEN)
    ),
    *(_signature("bf16", 8, 128, 16, form, NO_HISTORY) for form in FORMS),
    *(
        _signature("bf16", 8, 128, 16, "max_probability", kind, summed=True)
        for kind in (BY_BLOCK, BY_TOKEN)
    ),
    _signature("bf16", 8, 128, 64, "max_probability", BY_TOKEN),
    _signature("bf16", 8, 256, 16, "max_probability", BY_TOKEN),
    _signature("fp32", 4, 128, 16, "max_probability", BY_TOKEN),
]
