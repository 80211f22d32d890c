# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Which units stay, out of their scores: a selection by threshold, one program per row.

The smallest score that stays is found bit by bit in integers that are ordered as the scores are;
then one pass in order writes the places."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .signatures import Signature


@triton.jit
def _load_ordered(row, at, valid):
    """The scores as int32 that compare as they do; -0 is 0."""
    score = tl.load(row + at, mask=valid, other=0.0)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["units", "count"])
def _topk_kernel(scores, kept, units, count, TILE: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    row = scores + number * units
    out = kept + number * count
    offsets = tl.arange(0, TILE)

    # The largest threshold that at least `count` scores reach. XOR sets the bit that is tried: of
    # the sign it takes the 1 away, which makes the number larger just so.
    threshold = tl.full([], -(2**31), tl.int32)
    tried = tl.full([], -(2**31), tl.int32)
    for _ in range(32):
        higher = threshold ^ tried
        tried = (tried >> 1) & 0x7FFFFFFF
        reach = tl.zeros([TILE], tl.int32)
        for start in range(0, units, TILE):
            at = start + offsets
            score = _load_ordered(row, at, at < units)
            reach += ((score >= higher) & (at < units)).to(tl.int32)
        threshold = tl.where(tl.sum(reach, 0) >= count, higher, threshold)

    above = tl.zeros([TILE], tl.int32)
    equal = tl.zeros([TILE], tl.int32)
    for start in range(0, units, TILE):
        at = start + offsets
        score = _load_ordered(row, at, at < units)
        above += ((score > threshold) & (at < units)).to(tl.int32)
        equal += ((score == threshold) & (at < units)).to(tl.int32)
    # Of equals the oldest go.
    leaving = tl.sum(above, 0) + tl.sum(equal, 0) - count

    equals, written = 0, 0
    for start in range(0, units, TILE):
        at = start + offsets
        score = _load_ordered(row, at, at < units)
        ties = ((score == threshold) & (at < units)).to(tl.int32)
        older_equals = equals + tl.cumsum(ties, 0) - ties
        better = (score > threshold) & (at < units)
        stays = (better | ((ties != 0) & (older_equals >= leaving))).to(tl.int32)
        place = written + tl.cumsum(stays, 0) - 1
        tl.store(out + place, at.to(tl.int64), mask=stays != 0)
        equals += tl.sum(ties, 0)
        written += tl.sum(stays, 0)


def topk_keep(scores: Tensor, count: int) -> Tensor:
    """The `count` best units of each row in ascending order; of equals the newer ones.

    scores [..., units] float32 without NaN; returns [..., count] int64. ValueError for another type
    or a count that is not among the units."""
    units = scores.shape[-1]
    if not 0 <= count <= units:
        raise ValueError(f"topk_keep: cannot keep {count} of {units} units")
    if scores.dtype != torch.float32:
        raise ValueError(f"topk_keep: scores must be float32, got {scores.dtype}")
    kept = torch.empty((*scores.shape[:-1], count), dtype=torch.int64, device=scores.device)
    if not kept.numel():
        return kept
    tile = _tile(units)
    _topk_kernel[(kept.numel() // count,)](
        scores.contiguous(), kept, units, count, TILE=tile, num_warps=_warps(tile)
    )
    return kept


def _tile(units: int) -> int:
    """Units that a program takes at once: few enough sizes, so that few are compiled."""
    return 512 if units <= 512 else 4096


def _warps(tile: int) -> int:
    return 4 if tile == 512 else 8


SIGNATURES = [
    Signature(
        kernel=_topk_kernel,
        name=f"tiles of {tile}",
        signature={"scores": "*fp32", "kept": "*i64", "units": "i32", "count": "i32"},
        constexprs={"TILE": tile},
        divisible_by_16=("scores", "kept"),
        num_warps=_warps(tile),
    )
    for tile in (512, 4096)
]
