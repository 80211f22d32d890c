# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Reads and writes tokens in the paged KV cache of vLLM's CPU attention; slow, plain torch.

The cache of a layer is [num_blocks, kv_heads, block_size, 2 * head_dim]. Of each block and head the
first half holds the keys transposed, [head_dim, block_size], the second half the values,
[block_size, head_dim] (the "vec" layouts of vLLM's CPU kernels)."""

from __future__ import annotations

from torch import Tensor


def key_blocks(kv_cache: Tensor) -> Tensor:
    """A view of all keys: [num_blocks, kv_heads, head_dim, block_size]."""
    num_blocks, kv_heads, block_size, twice = kv_cache.shape
    return kv_cache.view(num_blocks, kv_heads, 2, twice // 2, block_size)[:, :, 0]


def value_blocks(kv_cache: Tensor) -> Tensor:
    """A view of all values: [num_blocks, kv_heads, block_size, head_dim]."""
    num_blocks, kv_heads, block_size, twice = kv_cache.shape
    return kv_cache.view(num_blocks, kv_heads, 2, block_size, twice // 2)[:, :, 1]


def gather_keys(kv_cache: Tensor, block_ids: Tensor) -> Tensor:
    """A copy of the keys of these blocks in order: [kv_heads, blocks * block_size, head_dim]."""
    return key_blocks(kv_cache)[block_ids].permute(1, 0, 3, 2).flatten(1, 2)


def gather_values(kv_cache: Tensor, block_ids: Tensor) -> Tensor:
    """A copy of the values of these blocks in order: [kv_heads, blocks * block_size, head_dim]."""
    return value_blocks(kv_cache)[block_ids].transpose(0, 1).flatten(1, 2)


def write_tokens(kv_cache: Tensor, block_ids: Tensor, keys: Tensor, values: Tensor) -> None:
    """Fill these blocks in order; what is left of the last one stays.

    keys and values [kv_heads, tokens, head_dim], at most block_ids * block_size tokens."""
    block_size, tokens = kv_cache.shape[2], keys.shape[1]
    for first in range(0, tokens, block_size):
        block, count = block_ids[first // block_size], min(block_size, tokens - first)
        of_block = slice(first, first + count)
        key_blocks(kv_cache)[block, :, :, :count] = keys[:, of_block].transpose(1, 2)
        value_blocks(kv_cache)[block, :, :count] = values[:, of_block]
