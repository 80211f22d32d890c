# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Eviction in vLLM's CPU worker."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from gkv_vllm.attention import cpu as cpu_attention
from gkv_vllm.worker.worker import EvictionWorkerMixin


class GKVCPUWorker(EvictionWorkerMixin, CPUWorker):
    """CPU_ATTN over live tables."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cpu_attention.register()
        super().__init__(*args, **kwargs)
