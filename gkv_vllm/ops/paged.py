# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The operators over one layer's paged KV cache: interface, torch reference, and who runs them.

`kv_cache` is one layer's cache in the layout of the platform (`ops/layout.py`), `block_ids` int64
ids of live blocks in logical order, `plane` [num_blocks, kv_heads, block_size] float32 one number
per cached token. Scores are float32, whatever the cache holds. `bind` gives the operators over all
layers that scoring calls (`ops/layers.py`)."""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from gkv_vllm.config import setting_named
from gkv_vllm.ops import layout as layouts
from gkv_vllm.ops import reference
from gkv_vllm.ops import topk as _topk
from gkv_vllm.ops.layers import EachLayer, LayerCaches, LayerOps
from gkv_vllm.ops.layout import CPULayout, GPULayout, Layout
from gkv_vllm.ops.live_table import LiveTable, prepare_step, squeeze


class PagedOps(Protocol):
    """What eviction computes on the device. Nothing is written except where it says so."""

    layout: Layout
    """Where keys and values lie."""

    @property
    def name(self) -> str:
        """Who computes: `reference`, or the device and its instruction set."""

    def bind(self, caches: LayerCaches) -> LayerOps:
        """The operators over all these layers."""

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
        """`reference.local_scores` of queries [query_heads, window, head_dim] over the live keys.

        Returns [kv_heads, live_tokens - window]."""

    def redundancy(
        self, kv_cache: Tensor, block_ids: Tensor, start: int, live_tokens: int, threshold: float
    ) -> Tensor:
        """`reference.redundancy` of the live keys from `start` (a multiple of the block size) on.

        Returns [kv_heads, live_tokens - start]."""

    def redundancy_in_block(
        self, kv_cache: Tensor, block_ids: Tensor, start: int, live_tokens: int, threshold: float
    ) -> Tensor:
        """The same with `reference.redundancy_in_block`."""

    def superseded(
        self, kv_cache: Tensor, block_ids: Tensor, start: int, live_tokens: int
    ) -> Tensor:
        """`reference.superseded` of the same keys: [kv_heads, live_tokens - start]."""

    def key_norms(self, kv_cache: Tensor, block_ids: Tensor, live_tokens: int) -> Tensor:
        """L2 norms of the live keys: [kv_heads, live_tokens]."""

    def block_max(self, scores: Tensor, block_size: int) -> Tensor:
        """`reference.block_max`: [..., blocks * block_size] to [..., blocks]."""

    def topk_keep(self, scores: Tensor, count: int) -> Tensor:
        """`topk.topk_keep`: [..., units] to the places of the best, [..., count] int64."""

    def compact(
        self,
        kv_cache: Tensor,
        plane: Tensor | None,
        source_ids: Tensor,
        target_ids: Tensor,
        keep: Tensor,
    ) -> None:
        """Move the kept tokens of the source blocks, in order, into the target blocks.

        keep [kv_heads or 1, target_ids * block_size] int64: ascending places among the source
        tokens, per head or for all. Writes kv_cache and plane; sources may be targets."""

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
        """Add the attention of this step's queries to the plane; tokens new in it start from 0.

        queries [tokens, query_heads, head_dim]; int32: live_table [requests, blocks], live_lens
        [requests], query_starts [requests + 1] and protected [requests], the leading tokens of a
        request that take no part in the sums (they do in the softmax), -1 to leave it alone."""

    def store_window_queries(self, queries: Tensor, places: Tensor, ring: Tensor) -> None:
        """ring[places[i]] = queries[i] for each token i that has a place, -1 saying it has none.

        queries [tokens, query_heads, head_dim], ring [places, query_heads, head_dim]; places int32,
        at least as many as tokens."""

    def squeeze_live_table(
        self, block_table: Tensor, seq_lens: Tensor, block_size: int
    ) -> LiveTable:
        """`live_table.squeeze`."""

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
        """`live_table.prepare_step`: the live table at addresses that stay, without a wait."""


class ReferenceOps:
    """Every operator in plain torch, over dense copies: slow, and meant to be read."""

    name = "reference"

    def __init__(self, layout: Layout | None = None) -> None:
        self.layout: Layout = layout or CPULayout()

    def bind(self, caches: LayerCaches) -> LayerOps:
        return EachLayer(self, caches)

    def _keys(self, kv_cache: Tensor, block_ids: Tensor) -> Tensor:
        return layouts.gather(self.layout.keys(kv_cache), block_ids)

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
        keys = self._keys(kv_cache, block_ids)[:, :live_tokens]
        return reference.local_scores(queries, keys, scale, softcap, form)

    def redundancy(
        self, kv_cache: Tensor, block_ids: Tensor, start: int, live_tokens: int, threshold: float
    ) -> Tensor:
        keys = self._keys(kv_cache, block_ids)[:, start:live_tokens]
        return reference.redundancy(keys, threshold)

    def redundancy_in_block(
        self, kv_cache: Tensor, block_ids: Tensor, start: int, live_tokens: int, threshold: float
    ) -> Tensor:
        keys = self._keys(kv_cache, block_ids)[:, start:live_tokens]
        return reference.redundancy_in_block(keys, kv_cache.shape[2], threshold)

    def superseded(
        self, kv_cache: Tensor, block_ids: Tensor, start: int, live_tokens: int
    ) -> Tensor:
        return reference.superseded(self._keys(kv_cache, block_ids)[:, start:live_tokens])

    def key_norms(self, kv_cache: Tensor, block_ids: Tensor, live_tokens: int) -> Tensor:
        return self._keys(kv_cache, block_ids)[:, :live_tokens].float().norm(dim=-1)

    def block_max(self, scores: Tensor, block_size: int) -> Tensor:
        return reference.block_max(scores, block_size)

    def topk_keep(self, scores: Tensor, count: int) -> Tensor:
        return _topk.topk_keep(scores, count)

    def compact(
        self,
        kv_cache: Tensor,
        plane: Tensor | None,
        source_ids: Tensor,
        target_ids: Tensor,
        keep: Tensor,
    ) -> None:
        keep = keep.expand(kv_cache.shape[1], -1)
        places = keep[..., None].expand(-1, -1, kv_cache.shape[3] // 2)
        for blocks in (self.layout.keys(kv_cache), self.layout.values(kv_cache)):
            survivors = layouts.gather(blocks, source_ids).gather(1, places)
            layouts.scatter(blocks, target_ids, survivors)
        if plane is not None:
            kept = plane[source_ids].transpose(0, 1).flatten(1).gather(1, keep)
            plane[target_ids] = kept.unflatten(1, (len(target_ids), -1)).transpose(0, 1)

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
        block_size = kv_cache.shape[2]
        starts, lens, leading = query_starts.tolist(), live_lens.tolist(), protected.tolist()
        for row, (tokens, first) in enumerate(zip(lens, leading, strict=True)):
            if first < 0:
                continue
            blocks = live_table[row, : -(-tokens // block_size)].long()
            keys = self._keys(kv_cache, blocks)[:, :tokens]
            new = queries[starts[row] : starts[row + 1]].transpose(0, 1)
            mass = reference.attention_mass(new, keys, scale, softcap)
            old = plane[blocks].transpose(0, 1).flatten(1)
            old[:, tokens - new.shape[1] : tokens] = 0
            old[:, first:tokens] += mass[:, first:]
            plane[blocks] = old.unflatten(1, (-1, block_size)).transpose(0, 1)

    def store_window_queries(self, queries: Tensor, places: Tensor, ring: Tensor) -> None:
        (stored,) = (places[: len(queries)] >= 0).nonzero(as_tuple=True)
        ring[places[stored].long()] = queries[stored]

    def squeeze_live_table(
        self, block_table: Tensor, seq_lens: Tensor, block_size: int
    ) -> LiveTable:
        return squeeze(block_table, seq_lens, block_size)

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
        prepare_step(
            *(block_table, seq_lens, query_starts, slots, block_size, window),
            *(live_table, live_lens, places),
        )


def resolve(impl: str, device: str = "cpu") -> PagedOps:
    """The operators that `kv_policy impl` asks for on this type of device (`cpu` or `cuda`).

    ValueError where they are asked for by name and this installation does not have them."""
    valid = setting_named("impl").metadata["choices"]
    if impl not in valid:
        raise ValueError(f"unknown impl '{impl}'; valid: {', '.join(valid)}")
    if device != "cpu":
        return _resolve_gpu(impl)
    if impl == "reference":
        return ReferenceOps()
    if impl == "cuda":
        raise ValueError("kv_policy impl=cuda, but the model runs on the CPU; set impl=auto")
    if impl == "triton":
        return _interpreted()
    try:
        from gkv_vllm.ops.cpu import CPUOps
    except ImportError as error:
        if impl == "auto":
            return ReferenceOps()
        raise ValueError(
            f"kv_policy impl=cpu, but the C++ operators are not there ({error}); install gkv_vllm "
            "beside torch where a C++ compiler is found, with --no-build-isolation, or set "
            "impl=auto"
        ) from error
    return CPUOps()


def _resolve_gpu(impl: str) -> PagedOps:
    if impl == "cpu":
        raise ValueError("kv_policy impl=cpu, but the model runs on a GPU; set impl=auto")
    if impl == "reference":
        return ReferenceOps(GPULayout())
    from gkv_vllm.ops.triton import TritonOps

    if impl == "triton":
        return TritonOps()
    try:
        from gkv_vllm.ops.cuda import CUDAOps, measured_choice
    except ImportError as error:
        if impl == "auto":
            return TritonOps()
        raise ValueError(
            f"kv_policy impl=cuda, but the CUDA operators are not there ({error}); build gkv_vllm "
            "where nvcc is found, with GKV_BUILD_CUDA=1, or set impl=auto"
        ) from error
    if impl == "cuda":
        return CUDAOps()
    chosen = measured_choice()
    return CUDAOps(chosen) if chosen else TritonOps()


def _interpreted() -> PagedOps:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "kv_policy impl=triton, but the model runs on the CPU, where only Triton's interpreter "
            "runs kernels, for tests (TRITON_INTERPRET=1); set impl=auto"
        )
    from gkv_vllm.ops.triton import TritonOps

    return TritonOps(CPULayout())


def describe(device: str = "cpu") -> str:
    """Which operators `impl=auto` runs on this type of device, and why not faster ones.

    ImportError on a GPU without Triton, where nothing would run."""
    if device != "cpu":
        return f"operators on {device}: {resolve('auto', device).name}{_unused()}"
    try:
        return f"operators: C++ for CPU ({resolve('cpu').name}), torch {torch.__version__}"
    except ValueError as error:
        return (
            f"operators: the torch reference, right but several times slower per eviction: {error}"
        )


def _unused() -> str:
    """Why CUDA C++ has no part in what `impl=auto` runs on a GPU; empty if it has."""
    try:
        from gkv_vllm.ops.cuda import measured_choice
    except ImportError:
        return "; CUDA C++ was not built (GKV_BUILD_CUDA=1 builds it where nvcc is found)"
    if measured_choice():
        return ""
    return "; CUDA C++ was built, but no measurement says that it is faster"
