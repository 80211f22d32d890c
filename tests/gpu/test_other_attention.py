# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Attention that is neither vLLM's Triton kernel nor our oracle, over live tables or over the
gathered survivors: FlashAttention and xformers on a GPU, xformers' masks anywhere."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gkv_vllm.ops.layout import GPULayout
from gkv_vllm.ops.paged import ReferenceOps

from .survivors import MIXED, NUM_BLOCKS, SHAPES, Batch, Shape, check

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@cache
def masks() -> Any:
    """xformers' masks, which need no device; skips where xformers is not there."""
    reason = "no xformers here; install gkv-vllm[xformers] beside CUDA's torch"
    return pytest.importorskip("xformers.ops.fmha.attn_bias", reason=reason)


@cache
def memory_efficient_attention() -> Any:
    """By its own CUTLASS kernel: left to choose, it takes FlashAttention."""
    masks()
    from xformers.ops import fmha

    if not torch.cuda.is_available():
        pytest.skip("xformers computes attention on a GPU only")
    if not fmha.cutlass.FwOp.is_available():
        pytest.skip("xformers' kernels do not load beside this torch: python -m xformers.info")
    return partial(fmha.memory_efficient_attention, op=(fmha.cutlass.FwOp, None))


def mask_of(batch: Batch) -> Any:
    """Each row's queries see its own survivors, the last query all of them."""
    alive = [len(r.survivors(batch.shape.block_size)) for r in batch.requests]
    counts = [len(r.queries) for r in batch.requests]
    return masks().BlockDiagonalCausalFromBottomRightMask.from_seqlens(counts, alive)


def live_table(batch: Batch) -> tuple[Tensor, Tensor]:
    """And live lengths, by the readable operator."""
    table, lens = torch.zeros_like(batch.table), torch.zeros_like(batch.seq_lens)
    slots = torch.full_like(lens, -1)
    ReferenceOps().prepare_step(
        *(batch.table, batch.seq_lens, batch.query_starts, slots),
        *(batch.shape.block_size, 1, table, lens, None),
    )
    return table, lens


def gathered(batch: Batch, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all rows in turn, through live tables: [tokens, kv_heads, head_dim]."""
    shape, device = batch.shape, cache.device
    table, lens = live_table(batch)
    ids = torch.cat(
        [
            row[torch.arange(count) // shape.block_size]
            for row, count in zip(table, lens.tolist(), strict=True)
        ]
    ).long()
    inside = torch.cat([torch.arange(count) % shape.block_size for count in lens.tolist()])
    layout = GPULayout()
    keys, values = (
        blocks[ids.to(device), :, inside.to(device)]
        for blocks in (layout.keys(cache), layout.values(cache))
    )
    return keys, values


@shapes
def test_gathered_survivors_under_the_mask_of_xformers(shape: Shape) -> None:
    """torch's attention with xformers' own idea of which query sees which key."""
    batch = Batch(shape, MIXED, torch.float32, seed=1, num_blocks=NUM_BLOCKS)
    keys, values = gathered(batch, batch.cache)
    mask = mask_of(batch).materialize((len(batch.queries), len(keys)))
    attended = torch.nn.functional.scaled_dot_product_attention(
        batch.queries.transpose(0, 1),
        keys.transpose(0, 1).repeat_interleave(shape.group, 0),
        values.transpose(0, 1).repeat_interleave(shape.group, 0),
        attn_mask=mask,
        scale=shape.scale,
    )
    check(attended.transpose(0, 1), batch)


@pytest.mark.gpu
@shapes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_xformers_over_gathered_survivors(shape: Shape, dtype: torch.dtype) -> None:
    attention = memory_efficient_attention()
    batch = Batch(shape, MIXED, dtype, seed=2, num_blocks=NUM_BLOCKS)
    keys, values = gathered(batch, batch.cache.cuda())
    attended = attention(
        batch.queries.cuda()[None],
        keys.repeat_interleave(shape.group, 1)[None],
        values.repeat_interleave(shape.group, 1)[None],
        attn_bias=mask_of(batch).to(keys.device),
        scale=shape.scale,
    )
    check(attended[0], batch)


@pytest.mark.gpu
@shapes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_attention_over_live_tables(shape: Shape, dtype: torch.dtype) -> None:
    """The kernel of FLASH_ATTN, as its backend calls it."""
    from vllm.v1.attention.backends import fa_utils

    if not (torch.cuda.is_available() and fa_utils.is_flash_attn_varlen_func_available()):
        pytest.skip("vLLM has no FlashAttention for this machine")
    batch = Batch(shape, MIXED, dtype, seed=4, num_blocks=NUM_BLOCKS)
    # It multiplies what lies behind a request's last token by zero, so that must be a number.
    used = batch.table[batch.table > 0].long()
    batch.cache[used] = batch.cache[used].nan_to_num(0)
    table, lens = live_table(batch)
    layout, cache, queries = GPULayout(), batch.cache.cuda(), batch.queries.cuda()
    attended = fa_utils.flash_attn_varlen_func(
        q=queries,
        k=layout.keys(cache).transpose(1, 2),
        v=layout.values(cache).transpose(1, 2),
        out=torch.empty_like(queries),
        cu_seqlens_q=batch.query_starts.cuda(),
        max_seqlen_q=max(len(request.queries) for request in batch.requests),
        seqused_k=lens.cuda(),
        max_seqlen_k=int(lens.max()),
        softmax_scale=shape.scale,
        causal=True,
        block_table=table.cuda(),
        fa_version=fa_utils.get_flash_attn_version(
            head_size=shape.head_dim, kv_cache_block_size=shape.block_size
        ),
    )
    check(attended, batch)
