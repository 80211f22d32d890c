# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The operators in C++ (csrc/cpu) behind the interface of `paged.PagedOps`.

Importing this fails with ImportError where the package was built without a C++ compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from gkv_vllm.ops import schemas
from gkv_vllm.ops.live_table import LiveTable
from gkv_vllm.ops.paged import ReferenceOps

from gkv_vllm.ops import _cpu  # isort: skip  (after torch, whose libraries it needs)

assert schemas.library is not None


class CPUOps(ReferenceOps):
    """Vectorised, with run-time dispatch on the instruction set, straight on the paged cache."""

    @property
    def name(self) -> str:  # type: ignore[override]
        """`cpu-` and the instruction set that runs: avx512, avx2 or baseline."""
        return f"cpu-{_cpu.isa()}"

    def local_scores(
        self,
        queries: Tensor,
        kv_cache: Tensor,
        block_ids: Tensor,
        live_tokens: int,
        scale: float,
        softcap: float,
        form: str,
    ) -> Tensor:
        return torch.ops.gkv.local_scores(
            queries, kv_cache, block_ids, live_tokens, scale, softcap, form
        )

    def redundancy(
        self, kv_cache: Tensor, block_ids: Tensor, start: int, live_tokens: int, threshold: float
    ) -> Tensor:
        return torch.ops.gkv.redundancy(kv_cache, block_ids, start, live_tokens, threshold, False)

    def redundancy_in_block(
        self, kv_cache: Tensor, block_ids: Tensor, start: int, live_tokens: int, threshold: float
    ) -> Tensor:
        return torch.ops.gkv.redundancy(kv_cache, block_ids, start, live_tokens, threshold, True)

    def superseded(
        self, kv_cache: Tensor, block_ids: Tensor, start: int, live_tokens: int
    ) -> Tensor:
        return torch.ops.gkv.superseded(kv_cache, block_ids, start, live_tokens)

    def key_norms(self, kv_cache: Tensor, block_ids: Tensor, live_tokens: int) -> Tensor:
        return torch.ops.gkv.key_norms(kv_cache, block_ids, live_tokens)

    def block_max(self, scores: Tensor, block_size: int) -> Tensor:
        return torch.ops.gkv.block_max(scores.contiguous(), block_size)

    def topk_keep(self, scores: Tensor, count: int) -> Tensor:
        return torch.ops.gkv.topk_keep(scores.contiguous(), count)

    def compact(
        self,
        kv_cache: Tensor,
        plane: Tensor | None,
        source_ids: Tensor,
        target_ids: Tensor,
        keep: Tensor,
    ) -> None:
        torch.ops.gkv.compact(kv_cache, plane, source_ids, target_ids, keep)

    def attention_mass(
        self,
        queries: Tensor,
        kv_cache: Tensor,
        plane: Tensor,
        live_table: Tensor,
        live_lens: Tensor,
        query_starts: Tensor,
        protected: Tensor,
        scale: float,
        softcap: float,
    ) -> None:
        torch.ops.gkv.attention_mass(
            queries,
            kv_cache,
            plane,
            live_table,
            live_lens,
            query_starts,
            protected,
            scale,
            softcap,
        )

    def store_window_queries(self, queries: Tensor, places: Tensor, ring: Tensor) -> None:
        torch.ops.gkv.store_window_queries(queries, places, ring)

    def squeeze_live_table(
        self, block_table: Tensor, seq_lens: Tensor, block_size: int
    ) -> LiveTable:
        table, lens, holes = torch.ops.gkv.squeeze_live_table(block_table, seq_lens, block_size)
        return LiveTable(table, lens) if holes else LiveTable(block_table, seq_lens)
