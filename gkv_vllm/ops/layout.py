# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Where keys and values lie in a layer's paged KV cache, as views; reads and writes in plain torch.

The cache of a layer is [num_blocks, kv_heads, block_size, 2 * head_dim] on every platform. What its
last two dimensions mean is the layout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class Layout:
    """Views [num_blocks, kv_heads, block_size, head_dim] of a layer's cache."""

    def keys(self, kv_cache: Tensor) -> Tensor:
        """All keys; writing to them writes to the cache."""
        raise NotImplementedError

    def values(self, kv_cache: Tensor) -> Tensor:
        """All values; writing to them writes to the cache."""
        raise NotImplementedError

    def read(self, kv_cache: Tensor, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of these blocks, each as `gather` returns them."""
        return gather(self.keys(kv_cache), block_ids), gather(self.values(kv_cache), block_ids)

    def write(self, kv_cache: Tensor, block_ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill these blocks with keys and values, each as `scatter` does."""
        scatter(self.keys(kv_cache), block_ids, keys)
        scatter(self.values(kv_cache), block_ids, values)


@dataclass(frozen=True)
class CPULayout(Layout):
    """vLLM's CPU attention (its "vec" kernels): a block and head holds its keys transposed,
    [head_dim, block_size], then its values, [block_size, head_dim]."""

    def keys(self, kv_cache: Tensor) -> Tensor:
        num_blocks, kv_heads, block_size, twice = kv_cache.shape
        halves = kv_cache.view(num_blocks, kv_heads, 2, twice // 2, block_size)
        return halves[:, :, 0].transpose(-1, -2)

    def values(self, kv_cache: Tensor) -> Tensor:
        num_blocks, kv_heads, block_size, twice = kv_cache.shape
        return kv_cache.view(num_blocks, kv_heads, 2, block_size, twice // 2)[:, :, 1]


@dataclass(frozen=True)
class GPULayout(Layout):
    """FLASH_ATTN and TRITON_ATTN: a token's key, then its value; NHD or HND is in the strides."""

    def keys(self, kv_cache: Tensor) -> Tensor:
        return kv_cache[..., : kv_cache.shape[-1] // 2]

    def values(self, kv_cache: Tensor) -> Tensor:
        return kv_cache[..., kv_cache.shape[-1] // 2 :]


def gather(blocks: Tensor, block_ids: Tensor) -> Tensor:
    """A copy of these blocks of a view, in order: [kv_heads, blocks * block_size, head_dim]."""
    return blocks[block_ids].transpose(0, 1).flatten(1, 2)


def scatter(blocks: Tensor, block_ids: Tensor, tokens: Tensor) -> None:
    """Fill these blocks of a view in order; what is left of the last one stays.

    tokens [kv_heads, tokens, head_dim], at most as many as the blocks hold."""
    size = blocks.shape[2]
    full, rest = divmod(tokens.shape[1], size)
    whole, part = tokens.split([full * size, rest], 1)
    blocks[block_ids[:full]] = whole.unflatten(1, (full, size)).transpose(0, 1)
    if rest:
        blocks[block_ids[full], :, :rest] = part
