# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Where keys and values lie in a layer's paged KV cache, as views; reads and writes in plain torch.

The cache of a layer is [num_blocks, kv_heads, block_size, 2 * head_dim] on every platform. What its
last two dimensions mean is the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gkv_vllm.ops import cpu_layout


class Layout(Protocol):
    """Views [num_blocks, kv_heads, block_size, head_dim] of a layer's cache."""

    def keys(self, kv_cache: Tensor) -> Tensor:
        """All keys; writing to them writes to the cache."""

    def values(self, kv_cache: Tensor) -> Tensor:
        """All values; writing to them writes to the cache."""


@dataclass(frozen=True)
class CPULayout:
    """vLLM's CPU attention ("vec"): the keys of a block and head are transposed."""

    def keys(self, kv_cache: Tensor) -> Tensor:
        return cpu_layout.key_blocks(kv_cache).transpose(-1, -2)

    def values(self, kv_cache: Tensor) -> Tensor:
        return cpu_layout.value_blocks(kv_cache)


@dataclass(frozen=True)
class GPULayout:
    """FLASH_ATTN and TRITON_ATTN: a token's key, then its value; NHD or HND is in the strides."""

    def keys(self, kv_cache: Tensor) -> Tensor:
        return kv_cache[..., : kv_cache.shape[-1] // 2]

    def values(self, kv_cache: Tensor) -> Tensor:
        return kv_cache[..., kv_cache.shape[-1] // 2 :]


def gather(blocks: Tensor, block_ids: Tensor) -> Tensor:
    """A copy of these blocks of a view, in order: [kv_heads, blocks * block_size, head_dim]."""
    return blocks[block_ids].transpose(0, 1).flatten(1, 2)


def scatter(blocks: Tensor, block_ids: Tensor, tokens: Tensor) -> None:
    """Fill these blocks of a view, in order; the inverse of `gather`."""
    size = blocks.shape[2]
    blocks[block_ids] = tokens.unflatten(1, (-1, size)).transpose(0, 1)
