# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The CPU_ATTN backend with holes."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.attention import selector
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from gkv_vllm.attention.wrap import wrap_backend
from gkv_vllm.engine.spec import GKVSpec

logger = init_logger(f"vllm.{__name__}")

READABLE_LAYOUTS = ("vec", "vec16")
"""Instruction sets of vLLM's CPU kernels whose key layout `CPULayout` describes."""


class ReadableKeysBuilder(CPUAttentionMetadataBuilder):
    """Keeps the keys of evictable layers in a layout that can be scored."""

    isa: str

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], *args: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, *args)
        if isinstance(kv_cache_spec, GKVSpec) and self.isa not in READABLE_LAYOUTS:
            logger.warning_once(
                "the %s attention kernels pack keys in a layout that a KV policy cannot score; "
                "using the vec kernels for layers under the policy",
                self.isa,
            )
            self.isa = "vec"
            self._set_isa_to_layers(layer_names)


class ReadableKeysBackend(CPUAttentionBackend):
    """CPU_ATTN with `ReadableKeysBuilder`."""

    @staticmethod
    def get_builder_cls() -> type[ReadableKeysBuilder]:
        return ReadableKeysBuilder


GKVCPUAttentionBackend = wrap_backend(ReadableKeysBackend)


def register() -> None:
    """Make vLLM's CPU_ATTN resolve to the wrapped backend in this process. Idempotent.

    vLLM remembers its choices: an engine without a policy may have run here before."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.GKVCPUAttentionBackend")
    selector._cached_get_attn_backend.cache_clear()
