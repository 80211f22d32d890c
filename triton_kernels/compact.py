# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Moves one request's surviving tokens into its target blocks, in place: one launch for all layers.

One program per layer, head and part (keys, values, plane). Number the source tokens in order. Let
survivor j lie at s(j) and go to d(j), which exists unless its target block is a fresh one; both
rise with j. A write to d(j) hits the survivor k with s(k) = d(j). If j moves left, d(j) < s(j),
then k < j. So k does not move right, since d(k) > s(k) = d(j) would mean k > j. It moves left or to
a fresh block, or is j itself. If j moves right, k > j, and k does not move left, likewise. So
nothing unread is overwritten when first all that move left or to fresh blocks go in rising order,
then all that move right in falling order, and each tile is read before it is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .paged import PagedLayers, load_pointer
from .signatures import Signature

SCAN = 512
"""Survivors that are looked at together to find out which of them move."""
TILE_BYTES = 16384
"""What a program holds in registers at a time: 128 bytes for each of its threads."""


@triton.jit
def _places(keep, target_places, survivor, exists, BLOCK_SIZE: tl.constexpr):
    """Where survivors lie, and whether each moves left (or to a fresh block), or right."""
    source = tl.load(keep + survivor, mask=exists, other=0)
    block = tl.load(target_places + survivor // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
    target = block * BLOCK_SIZE + survivor % BLOCK_SIZE
    left = exists & ((block < 0) | (target < source))
    right = exists & (block >= 0) & (target > source)
    return source, left, right


@triton.jit
def _move_tile(
    base,
    keep,
    source_ids,
    target_ids,
    target_places,
    survivor,
    exists,
    block_stride,
    token_stride,
    dim_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    RIGHT: tl.constexpr,
):
    source, left, right = _places(keep, target_places, survivor, exists, BLOCK_SIZE)
    moves = right if RIGHT else left
    # Masked by `moves`, these loads do not compile with Triton 3.6 ("mask type matches ptr type").
    from_block = tl.load(source_ids + source // BLOCK_SIZE).to(tl.int64)
    to_block = tl.load(target_ids + tl.where(exists, survivor, 0) // BLOCK_SIZE).to(tl.int64)
    from_row = from_block * block_stride + (source % BLOCK_SIZE) * token_stride
    to_row = to_block * block_stride + (survivor % BLOCK_SIZE).to(tl.int64) * token_stride
    dim = tl.arange(0, DIM)
    mask = moves[:, None] & (dim < HEAD_DIM)[None, :]
    rows = tl.load(base + from_row[:, None] + dim[None, :] * dim_stride, mask=mask)
    # No thread writes before all have read the tile, or reads the next one before all have written.
    tl.debug_barrier()
    tl.store(base + to_row[:, None] + dim[None, :] * dim_stride, rows, mask=mask)
    tl.debug_barrier()


@triton.jit
def _move(
    base,
    keep,
    source_ids,
    target_ids,
    target_places,
    survivors,
    block_stride,
    token_stride,
    dim_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    SCAN: tl.constexpr,
):
    """All survivors of one head, out of and into the rows at `base`."""
    offsets = tl.arange(0, SCAN)
    first_left = tl.full([SCAN], 2**30, tl.int32)
    end_left = tl.zeros([SCAN], tl.int32)
    first_right = tl.full([SCAN], 2**30, tl.int32)
    end_right = tl.zeros([SCAN], tl.int32)
    for start in range(0, survivors, SCAN):
        survivor = start + offsets
        _, left, right = _places(keep, target_places, survivor, survivor < survivors, BLOCK_SIZE)
        first_left = tl.minimum(first_left, tl.where(left, survivor, 2**30))
        end_left = tl.maximum(end_left, tl.where(left, survivor + 1, 0))
        first_right = tl.minimum(first_right, tl.where(right, survivor, 2**30))
        end_right = tl.maximum(end_right, tl.where(right, survivor + 1, 0))

    end = tl.max(end_left, 0)
    for start in range(tl.min(first_left, 0), end, TILE):
        survivor = start + tl.arange(0, TILE)
        _move_tile(
            base,
            keep,
            source_ids,
            target_ids,
            target_places,
            survivor,
            survivor < end,
            block_stride,
            token_stride,
            dim_stride,
            BLOCK_SIZE,
            HEAD_DIM,
            DIM,
            RIGHT=False,
        )
    first = tl.min(first_right, 0)
    end = tl.max(end_right, 0)
    for done in range(0, end - first, TILE):
        survivor = end - done - TILE + tl.arange(0, TILE)
        _move_tile(
            base,
            keep,
            source_ids,
            target_ids,
            target_places,
            survivor,
            survivor >= first,
            block_stride,
            token_stride,
            dim_stride,
            BLOCK_SIZE,
            HEAD_DIM,
            DIM,
            RIGHT=True,
        )


@triton.jit(
    do_not_specialize=[
        "survivors",
        "source_stride",
        "target_stride",
        "place_stride",
        "keep_layer_stride",
        "keep_head_stride",
    ]
)
def _compact_kernel(
    key_pointers,
    value_pointers,
    planes,
    element,
    source_ids,
    target_ids,
    target_places,
    keep,
    survivors,
    source_stride,
    target_stride,
    place_stride,
    keep_layer_stride,
    keep_head_stride,
    key_block_stride,
    key_head_stride,
    key_token_stride,
    key_dim_stride,
    value_block_stride,
    value_head_stride,
    value_token_stride,
    value_dim_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    SCAN: tl.constexpr,
):
    part, layer = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    source_ids += layer * source_stride
    target_ids += layer * target_stride
    target_places += layer * place_stride
    keep += layer * keep_layer_stride + head * keep_head_stride
    if part == 0:
        _move(
            load_pointer(key_pointers, layer, element) + head * key_head_stride,
            keep,
            source_ids,
            target_ids,
            target_places,
            survivors,
            key_block_stride,
            key_token_stride,
            key_dim_stride,
            BLOCK_SIZE,
            HEAD_DIM,
            DIM,
            TILE,
            SCAN,
        )
    elif part == 1:
        _move(
            load_pointer(value_pointers, layer, element) + head * value_head_stride,
            keep,
            source_ids,
            target_ids,
            target_places,
            survivors,
            value_block_stride,
            value_token_stride,
            value_dim_stride,
            BLOCK_SIZE,
            HEAD_DIM,
            DIM,
            TILE,
            SCAN,
        )
    elif planes is not None:
        plane = tl.cast(tl.load(planes + layer), tl.pointer_type(tl.float32))
        _move(
            plane + head * BLOCK_SIZE,
            keep,
            source_ids,
            target_ids,
            target_places,
            survivors,
            heads * BLOCK_SIZE,
            1,
            1,
            BLOCK_SIZE,
            1,
            1,
            SCAN,
            SCAN,
        )


def compact(
    layers: PagedLayers,
    planes: Tensor | None,
    source_ids: Tensor,
    target_ids: Tensor,
    keep: Tensor,
    *,
    target_places: Tensor,
) -> None:
    """Move the kept tokens of the source blocks, in order, into the target blocks, bit by bit.

    planes [layers] int64: the address of each layer's plane, a contiguous float32
    [num_blocks, kv_heads, block_size] (`paged.pointers`), or None. source_ids [layers, sources] and
    target_ids [layers, targets], int64 or int32: physical blocks, none twice; target_places
    [targets] or [layers, targets], int64 or int32: which source each target is, -1 for a block from
    elsewhere, rising where it is not -1. keep [layers, kv_heads or 1, targets * block_size] int64:
    rising places among the source tokens, per head or for all. Writes keys, values and planes.
    ValueError names what does not fit."""
    num_layers, kv_heads = layers.num_layers, layers.kv_heads
    for name, ids in (("source_ids", source_ids), ("target_ids", target_ids)):
        _check_ids(name, ids, layers)
        if ids.ndim != 2 or ids.shape[0] != num_layers:
            raise ValueError(
                f"compact: {name} must be [{num_layers}, blocks], got {tuple(ids.shape)}"
            )
    targets = target_ids.shape[1]
    _check_ids("target_places", target_places, layers)
    if target_places.shape not in ((targets,), (num_layers, targets)):
        raise ValueError(
            f"compact: target_places must be [{targets}] or [{num_layers}, {targets}], "
            f"got {tuple(target_places.shape)}"
        )
    survivors = targets * layers.block_size
    _check_ids("keep", keep, layers, (torch.int64,))
    if keep.shape not in ((num_layers, kv_heads, survivors), (num_layers, 1, survivors)):
        raise ValueError(
            f"compact: keep must be [{num_layers}, {kv_heads} or 1, {survivors}], "
            f"got {tuple(keep.shape)}"
        )
    if targets > source_ids.shape[1]:
        raise ValueError(
            f"compact: target_ids must be no more than the {source_ids.shape[1]} sources, "
            f"got {targets}"
        )
    if planes is not None:
        _check_ids("planes", planes, layers, (torch.int64,))
        if planes.shape != (num_layers,):
            raise ValueError(f"compact: planes must be [{num_layers}], got {tuple(planes.shape)}")
    if not survivors:
        return
    key, value = layers.keys[0], layers.values[0]
    _compact_kernel[(2 if planes is None else 3, kv_heads, num_layers)](
        layers.key_pointers,
        layers.value_pointers,
        planes,
        key,
        source_ids,
        target_ids,
        target_places,
        keep,
        survivors,
        source_ids.stride(0),
        target_ids.stride(0),
        target_places.stride(0) if target_places.ndim == 2 else 0,
        keep.stride(0),
        keep.stride(1) if keep.shape[1] > 1 else 0,
        *key.stride(),
        *value.stride(),
        **_sizes(layers.block_size, layers.head_dim, key.element_size()),
        num_warps=4,
        num_stages=1,
    )


def _check_ids(
    name: str,
    ids: Tensor,
    layers: PagedLayers,
    dtypes: tuple[torch.dtype, ...] = (torch.int32, torch.int64),
) -> None:
    if ids.dtype not in dtypes or ids.stride(-1) != 1 or ids.device != layers.device:
        raise ValueError(
            f"compact: {name} must be {' or '.join(map(str, dtypes))} on {layers.device} with a "
            f"dense last dimension, got {ids.dtype} on {ids.device}, strides {ids.stride()}"
        )


def _sizes(block_size: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    dim = triton.next_power_of_2(head_dim)
    return dict(
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        DIM=dim,
        TILE=max(1, min(128, TILE_BYTES // (dim * itemsize))),
        SCAN=SCAN,
    )


def _signature(dtype: str, head_dim: int, planes: bool) -> Signature:
    tables = ("key_pointers", "value_pointers", "source_ids", "target_ids", "target_places", "keep")
    strides = [
        f"{of}_{what}_stride" for of in ("key", "value") for what in ("block", "head", "token")
    ]
    counts = ("survivors", "source_stride", "target_stride", "place_stride")
    keep_strides = ("keep_layer_stride", "keep_head_stride")
    types = dict.fromkeys(tables, "*i64") | {"element": f"*{dtype}"}
    types |= dict.fromkeys((*strides, *counts, *keep_strides), "i32")
    constants = _sizes(16, head_dim, 2) | {"key_dim_stride": 1, "value_dim_stride": 1}
    return Signature(
        kernel=_compact_kernel,
        name=f"{dtype} d{head_dim}" + (" with planes" if planes else ""),
        signature=types | ({"planes": "*i64"} if planes else {}),
        constexprs=constants | ({} if planes else {"planes": None}),
        divisible_by_16=(*tables, "element", *strides, *(("planes",) if planes else ())),
        num_stages=1,
    )


SIGNATURES = [
    _signature(dtype, head_dim, planes)
    for dtype in ("bf16", "fp16")
    for head_dim in (64, 96, 128, 256)
    for planes in (False, True)
]
