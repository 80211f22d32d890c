# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The FLASH_ATTN and TRITON_ATTN backends with holes."""

from __future__ import annotations

from vllm.v1.attention import selector
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from gkv_vllm.attention.wrap import wrap_backend

GKVFlashAttentionBackend = wrap_backend(FlashAttentionBackend)
GKVTritonAttentionBackend = wrap_backend(TritonAttentionBackend)


def register() -> None:
    """Make vLLM's FLASH_ATTN and TRITON_ATTN resolve to the wrapped backends. Idempotent.

    vLLM remembers its choices: an engine without a policy may have run here before."""
    register_backend(AttentionBackendEnum.FLASH_ATTN, f"{__name__}.GKVFlashAttentionBackend")
    register_backend(AttentionBackendEnum.TRITON_ATTN, f"{__name__}.GKVTritonAttentionBackend")
    selector._cached_get_attn_backend.cache_clear()
