# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""How kernels address the paged KV caches of all layers: tables of pointers, and strides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_pointer(table, index, like):
    """The `index`-th address of a pointer table, as a pointer to what `like` points at."""
    address = tl.load(table + index)
    return tl.multiple_of(tl.cast(address, like.dtype), 16)


@dataclass(frozen=True)
class PagedLayers:
    """The caches of all layers that are evicted together: same shape, strides and type.

    Keys and values are views [num_blocks, kv_heads, block_size, head_dim] of the caches: any layout
    (NHD, HND, or the CPU's transposed keys) is a matter of strides."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    key_pointers: Tensor
    """[layers] int64 addresses, on the device of the caches."""
    value_pointers: Tensor

    @classmethod
    def of(cls, keys: Sequence[Tensor], values: Sequence[Tensor]) -> PagedLayers:
        """Check that the layers agree, and tabulate their addresses: one upload, to be kept."""
        for name, views in (("keys", keys), ("values", values)):
            kinds = {(x.shape, x.stride(), x.dtype, x.device) for x in views}
            if len(kinds) != 1:
                raise ValueError(f"{name} of all layers must agree in shape, strides and type")
            if views[0].ndim != 4:
                raise ValueError(
                    f"{name} must be [num_blocks, kv_heads, block_size, head_dim], "
                    f"got {tuple(views[0].shape)}"
                )
        if len(keys) != len(values) or keys[0].shape != values[0].shape:
            raise ValueError("keys and values must be the same layers, with the same shapes")
        return cls(tuple(keys), tuple(values), pointers(keys), pointers(values))

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    @property
    def kv_heads(self) -> int:
        return self.keys[0].shape[1]

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[2]

    @property
    def head_dim(self) -> int:
        return self.keys[0].shape[3]

    @property
    def device(self) -> torch.device:
        return self.keys[0].device


def pointers(tensors: Sequence[Tensor]) -> Tensor:
    """The addresses of these tensors' first elements: [tensors] int64 on their device."""
    return torch.tensor(
        [x.data_ptr() for x in tensors], dtype=torch.int64, device=tensors[0].device
    )
