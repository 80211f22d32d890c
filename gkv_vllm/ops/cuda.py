# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The operators of csrc/cuda where they are chosen, Triton's for the rest.

Importing this fails with ImportError where the package was built without them."""

from __future__ import annotations

import json
from collections.abc import Collection
from importlib.resources import files

import torch
from torch import Tensor

from gkv_vllm.ops import schemas
from gkv_vllm.ops.layers import LayerCaches, LayerOps
from gkv_vllm.ops.triton import TritonLayerOps, TritonOps

from gkv_vllm.ops import _cuda  # isort: skip  (after torch, whose libraries it needs)

assert schemas.library is not None

OPERATORS = ("compact", "prepare_step", "store_window_queries")
"""What csrc/cuda has."""


class CUDAOps(TritonOps):
    """CUDA C++ for the operators in `chosen`, Triton kernels for all others."""

    def __init__(self, chosen: Collection[str] = OPERATORS) -> None:
        super().__init__()
        self.chosen = frozenset(chosen)

    @property
    def name(self) -> str:  # type: ignore[override]
        chosen = ", ".join(sorted(self.chosen))
        return f"triton, and CUDA C++ ({_cuda.architectures()}) for {chosen}"

    def bind(self, caches: LayerCaches) -> LayerOps:
        return CUDALayerOps(self, caches) if "compact" in self.chosen else super().bind(caches)

    def prepare_step(
        self,
        block_table: Tensor,
        seq_lens: Tensor,
        query_starts: Tensor,
        slots: Tensor,
        block_size: int,
        window: int,
        live_table: Tensor,
        live_lens: Tensor,
        places: Tensor | None,
    ) -> None:
        if places is None or "prepare_step" not in self.chosen:
            super().prepare_step(
                *(block_table, seq_lens, query_starts, slots, block_size, window),
                *(live_table, live_lens, places),
            )
            return
        torch.ops.gkv.prepare_step(
            *(block_table, seq_lens, query_starts, slots, block_size, window),
            *(live_table, live_lens, places),
        )

    def store_window_queries(self, queries: Tensor, places: Tensor, ring: Tensor) -> None:
        if "store_window_queries" in self.chosen:
            torch.ops.gkv.store_window_queries(queries, places, ring)
        else:
            super().store_window_queries(queries, places, ring)


class CUDALayerOps(TritonLayerOps):
    """Compaction of all layers in CUDA C++."""

    def compact(
        self, source_ids: Tensor, target_ids: Tensor, target_places: Tensor, keep: Tensor
    ) -> None:
        layers = self.caches.num_layers
        torch.ops.gkv.compact_layers(
            list(self.caches.kv_caches),
            list(self.caches.planes or ()),
            source_ids.contiguous(),
            target_ids.contiguous(),
            target_places.int().expand(layers, -1).contiguous(),
            keep.contiguous(),
        )


def measured_choice() -> list[str]:
    """The operators that ran faster in CUDA C++ than in Triton, as `choice.json` records.

    `benchmarks/gpu/kernels.py --record` writes that file on the machine it measures."""
    recorded = json.loads(files("gkv_vllm.ops").joinpath("choice.json").read_text())
    return [name for name, faster in recorded["ops"].items() if faster == "cuda"]
