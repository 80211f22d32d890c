# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The L2 norms of one request's live keys, in all layers and heads in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .paged import PagedLayers, load_pointer
from .requests import load_live_keys
from .signatures import Signature


@triton.jit(do_not_specialize=["live_tokens", "table_stride"])
def _key_norms_kernel(
    key_pointers,
    key_type,
    block_ids,
    norms,
    live_tokens,
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    dim_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    head, layer = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    at = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    key = load_live_keys(
        load_pointer(key_pointers, layer, key_type) + head * head_stride,
        block_ids + layer * table_stride,
        at,
        live_tokens,
        block_stride,
        token_stride,
        dim_stride,
        BLOCK_SIZE,
        HEAD_DIM,
        DIM,
    ).to(tl.float32)
    row = (layer * tl.num_programs(1) + head) * live_tokens
    tl.store(norms + row + at, tl.sqrt_rn(tl.sum(key * key, 1)), mask=at < live_tokens)


def key_norms(layers: PagedLayers, block_ids: Tensor, live_tokens: int) -> Tensor:
    """The norms of a request's live keys, in float32: [layers, kv_heads, live_tokens].

    block_ids [layers, blocks] int64 with dense rows, which may be one and the same for all layers:
    its live blocks in logical order. ValueError says what does not fit."""
    if (
        block_ids.dtype != torch.int64
        or block_ids.ndim != 2
        or block_ids.shape[0] != layers.num_layers
        or block_ids.shape[1] * layers.block_size < live_tokens
        or (block_ids.stride(1) != 1 and block_ids.shape[1] > 1)
    ):
        raise ValueError(
            f"key_norms: block_ids must be int64 [{layers.num_layers}, blocks] with dense rows, "
            f"that hold {live_tokens} tokens, got {block_ids.dtype} {tuple(block_ids.shape)} with "
            f"strides {block_ids.stride()}"
        )
    if block_ids.device != layers.device:
        raise ValueError(
            f"key_norms: block_ids must be on {layers.device}, is on {block_ids.device}"
        )
    size = (layers.num_layers, layers.kv_heads, live_tokens)
    norms = torch.empty(size, dtype=torch.float32, device=layers.device)
    keys = layers.keys[0]
    sizes = _sizes(layers.block_size, layers.head_dim)
    grid = (triton.cdiv(live_tokens, sizes["KEYS"]), layers.kv_heads, layers.num_layers)
    if norms.numel():
        _key_norms_kernel[grid](
            layers.key_pointers,
            keys,
            block_ids,
            norms,
            live_tokens,
            block_ids.stride(0),
            *keys.stride(),
            **sizes,
            num_warps=4,
        )
    return norms


def _sizes(block_size: int, head_dim: int) -> dict[str, int]:
    """What the kernel is compiled for: 8192 elements of keys at a time."""
    dim = triton.next_power_of_2(head_dim)
    return dict(BLOCK_SIZE=block_size, HEAD_DIM=head_dim, DIM=dim, KEYS=max(16, 8192 // dim))


def _signature(dtype: str, head_dim: int) -> Signature:
    strides = ("block_stride", "head_stride", "token_stride")
    types = {
        "key_pointers": "*i64",
        "key_type": f"*{dtype}",
        "block_ids": "*i64",
        "norms": "*fp32",
        "live_tokens": "i32",
        "table_stride": "i32",
        **dict.fromkeys(strides, "i32"),
    }
    return Signature(
        kernel=_key_norms_kernel,
        name=f"{dtype} d{head_dim}",
        signature=types,
        constexprs=_sizes(16, head_dim) | {"dim_stride": 1},
        divisible_by_16=("key_pointers", "key_type", "norms", *strides),
    )


SIGNATURES = [
    _signature(dtype, head_dim)
    for dtype, head_dim in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp16", 128))
]
