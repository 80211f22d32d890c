# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""vLLM's own paged attention for one decode step, as its backends call it; no stand-in for it."""

from __future__ import annotations

from typing import Protocol

import torch
from gpu.common import Model
from torch import Tensor


class Attention(Protocol):
    """Attention of one query per row over [num_blocks, kv_heads, block_size, 2 * head_dim]."""

    name: str

    def __call__(self, queries: Tensor, cache: Tensor, table: Tensor, lens: Tensor) -> Tensor:
        """queries [rows, query_heads, head_dim], table [rows, blocks] int32, lens [rows] int32."""


class Flash:
    """FLASH_ATTN: FlashAttention 3 on Hopper, 2 before."""

    name = "FLASH_ATTN"

    def __init__(self, model: Model, rows: int, longest: int, device: str) -> None:
        from vllm.v1.attention.backends import fa_utils

        self.attend = fa_utils.flash_attn_varlen_func
        self.version = fa_utils.get_flash_attn_version(
            head_size=model.head_dim, kv_cache_block_size=model.block_size
        )
        if self.version is None:
            raise ImportError("vLLM has no FlashAttention for this device")
        self.name = f"{self.name} {self.version}"
        self.head_dim, self.longest = model.head_dim, longest
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)

    def __call__(self, queries: Tensor, cache: Tensor, table: Tensor, lens: Tensor) -> Tensor:
        keys, values = cache.transpose(1, 2).split(self.head_dim, dim=-1)
        return self.attend(
            q=queries,
            k=keys,
            v=values,
            max_seqlen_q=1,
            cu_seqlens_q=self.starts,
            max_seqlen_k=self.longest,
            seqused_k=lens,
            softmax_scale=self.head_dim**-0.5,
            causal=True,
            block_table=table,
            fa_version=self.version,
        )


class Unified:
    """TRITON_ATTN: one Triton kernel, split along the keys for few rows."""

    name = "TRITON_ATTN"
    SEGMENTS = 16
    LEAST_PROGRAMS = 128
    """With fewer, vLLM's backend splits the keys."""

    def __init__(self, model: Model, rows: int, longest: int, device: str) -> None:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        self.attend = unified_attention
        self.model, self.longest = model, longest
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.split_up_to = self.LEAST_PROGRAMS // model.kv_heads
        split = (self.split_up_to, model.query_heads, self.SEGMENTS)
        padded = 1 << (model.head_dim - 1).bit_length()
        self.outputs = torch.empty(*split, padded, device=device)
        self.maxima, self.sums = (
            torch.empty(split, device=device),
            torch.empty(split, device=device),
        )

    def __call__(self, queries: Tensor, cache: Tensor, table: Tensor, lens: Tensor) -> Tensor:
        keys, values = cache.transpose(1, 2).split(self.model.head_dim, dim=-1)
        out = torch.empty_like(queries)
        self.attend(
            q=queries,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=self.starts,
            max_seqlen_q=1,
            seqused_k=lens,
            max_seqlen_k=self.longest,
            softmax_scale=self.model.head_dim**-0.5,
            causal=True,
            window_size=(-1, -1),
            block_table=table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=self.split_up_to,
            num_par_softmax_segments=self.SEGMENTS,
            softmax_segm_output=self.outputs,
            softmax_segm_max=self.maxima,
            softmax_segm_expsum=self.sums,
        )
        return out


BACKENDS: dict[str, type[Flash] | type[Unified]] = {
    "FLASH_ATTN": Flash,
    "TRITON_ATTN": Unified,
}


def choose(name: str, device: str) -> type[Flash] | type[Unified]:
    """The backend of this name; `auto`: FlashAttention where vLLM has it for this device.

    ImportError says what is missing: attention over gathered keys would be no baseline."""
    if name != "auto":
        return BACKENDS[name]
    try:
        import vllm  # noqa: F401
        from vllm.v1.attention.backends.fa_utils import is_flash_attn_varlen_func_available
    except ImportError as error:
        raise ImportError(
            "a decode step is measured with vLLM's own paged attention, and vLLM is not here "
            f"({error}); install it, or make a bundle (benchmarks/gpu/bundle.py)"
        ) from error
    return Flash if device == "cuda" and is_flash_attn_varlen_func_available() else Unified
