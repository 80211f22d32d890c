# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Eviction in vLLM's GPU worker, with Model Runner V2 or V1."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from gkv_vllm.attention import gpu as gpu_attention
from gkv_vllm.worker.worker import EvictionWorkerMixin


class GKVGPUWorker(EvictionWorkerMixin, Worker):
    """FLASH_ATTN or TRITON_ATTN, whichever the platform or the user chose, over live tables."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        gpu_attention.register()
        super().__init__(*args, **kwargs)
