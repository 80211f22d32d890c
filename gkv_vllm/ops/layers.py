# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The operators over all evicted layers at once, bound to their caches: what scoring calls.

`EachLayer` makes them out of operators that know one layer (`paged.PagedOps`); on a GPU one launch
serves all layers. `block_ids` [layers, blocks] int64 are one request's live blocks in logical
order, for each layer since KV cache groups hold them in different places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gkv_vllm.ops import layout as layouts

if TYPE_CHECKING:
    from gkv_vllm.ops.layout import Layout
    from gkv_vllm.ops.paged import PagedOps
    from gkv_vllm.policies.base import GlobalScore
    from gkv_vllm.policies.view import View
    from gkv_vllm.worker.scorer import BlockMemory


@dataclass(frozen=True)
class LayerCaches:
    """The caches of the evicted layers, in the model's order."""

    kv_caches: tuple[Tensor, ...]
    """Each [num_blocks, kv_heads, block_size, 2 * head_dim]; all of one shape and type."""
    layout: Layout
    planes: tuple[Tensor, ...] | None = None
    """Each [num_blocks, kv_heads, block_size] float32: one number per cached token. Layers that
    share a cache share its plane."""
    first_head: int = 0
    """Which of the model's KV heads is the first here; with tensor parallelism a rank has some."""
    model_heads: int | None = None
    """How many KV heads the model has; None where all are here."""

    @property
    def num_layers(self) -> int:
        return len(self.kv_caches)

    @property
    def kv_heads(self) -> int:
        return self.kv_caches[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.kv_caches[0].device

    @cached_property
    def _stacked(self) -> tuple[Tensor, Tensor] | None:
        """One tensor that all planes are slices of, and each layer's slice, if there is one."""
        assert self.planes is not None
        base, step = self.planes[0]._base, self.planes[0].numel()
        if base is None or any(x._base is not base for x in self.planes):
            return None
        index = [x.storage_offset() // step for x in self.planes]
        return base.view(-1, *self.planes[0].shape), torch.tensor(index, device=self.device)

    def read_planes(self, block_ids: Tensor) -> Tensor:
        """The numbers of these blocks' tokens: [layers, kv_heads, blocks * block_size]."""
        assert self.planes is not None
        if self._stacked is not None:
            planes, index = self._stacked
            blocks = planes[index[:, None], block_ids]
        else:
            blocks = torch.stack([p[ids] for p, ids in zip(self.planes, block_ids, strict=True)])
        return blocks.transpose(1, 2).flatten(2)

    def write_planes(self, block_ids: Tensor, numbers: Tensor) -> None:
        """The inverse of `read_planes`."""
        assert self.planes is not None
        blocks = numbers.unflatten(-1, (block_ids.shape[1], -1)).transpose(1, 2)
        if self._stacked is not None:
            planes, index = self._stacked
            planes[index[:, None], block_ids] = blocks
        else:
            for plane, ids, new in zip(self.planes, block_ids, blocks, strict=True):
                plane[ids] = new


class LayerOps(Protocol):
    """What eviction computes for one request in all layers. Only `compact` writes."""

    caches: LayerCaches
    fuses: bool
    """Whether `global_scores` computes G-KV's score for all due requests in a few launches."""

    @property
    def name(self) -> str:
        """Who computes."""

    def local_scores(
        self,
        queries: Tensor,
        block_ids: Tensor,
        live_tokens: int,
        scale: float,
        softcap: float,
        form: str,
    ) -> Tensor:
        """`reference.local_scores` of queries [layers, query_heads, window, head_dim].

        Returns [layers, kv_heads, live_tokens - window]."""

    def redundancy(
        self,
        block_ids: Tensor,
        start: int,
        live_tokens: int,
        threshold: float,
        within_blocks: bool,
    ) -> Tensor:
        """`reference.redundancy` of the live keys from `start` (a multiple of the block size) on.

        Among the keys of each cache block alone where asked for (`reference.redundancy_in_block`).
        Returns [layers, kv_heads, live_tokens - start]."""

    def superseded(self, block_ids: Tensor, start: int, live_tokens: int) -> Tensor:
        """`reference.superseded` of the live keys from `start` (a multiple of the block size) on.

        Returns [layers, kv_heads, live_tokens - start]."""

    def key_norms(self, block_ids: Tensor, live_tokens: int) -> Tensor:
        """L2 norms of the live keys: [layers, kv_heads, live_tokens]."""

    def keys(self, block_ids: Tensor, live_tokens: int) -> Tensor:
        """A dense copy of the live keys: [layers, kv_heads, live_tokens, head_dim]."""

    def values(self, block_ids: Tensor, live_tokens: int) -> Tensor:
        """A dense copy of the live values: [layers, kv_heads, live_tokens, head_dim]."""

    def block_max(self, scores: Tensor, block_size: int) -> Tensor:
        """`reference.block_max`: [..., blocks * block_size] to [..., blocks]."""

    def topk_keep(self, scores: Tensor, count: int) -> Tensor:
        """`topk.topk_keep`: [..., units] to the places of the best, [..., count] int64."""

    def compact(
        self, source_ids: Tensor, target_ids: Tensor, target_places: Tensor, keep: Tensor
    ) -> None:
        """Move the kept tokens of the source blocks, in order, into the target blocks.

        source_ids [layers, sources] and target_ids [layers, targets] int64; target_places [targets]
        int64: which source each target is, -1 for a block from elsewhere; keep
        [layers, kv_heads or 1, targets * block_size] int64: ascending places among the source
        tokens, per head or for all. Writes K, V and the planes."""

    def global_scores(
        self, formula: GlobalScore, views: Sequence[View], memory: BlockMemory | None
    ) -> list[Tensor]:
        """The scores of `GKV.score` for all these requests: [layers, kv_heads, units] each.

        Renews the history in place: in the planes, or in `memory` with block granularity. The
        views need no history. Only where `fuses`."""


class EachLayer:
    """`LayerOps` out of operators for one layer, called for each."""

    fuses = False

    def __init__(self, ops: PagedOps, caches: LayerCaches) -> None:
        self.ops = ops
        self.caches = caches

    @property
    def name(self) -> str:
        return self.ops.name

    def local_scores(
        self,
        queries: Tensor,
        block_ids: Tensor,
        live_tokens: int,
        scale: float,
        softcap: float,
        form: str,
    ) -> Tensor:
        return self._each(
            lambda i, cache: self.ops.local_scores(
                queries[i], cache, block_ids[i], live_tokens, scale, softcap, form
            )
        )

    def redundancy(
        self,
        block_ids: Tensor,
        start: int,
        live_tokens: int,
        threshold: float,
        within_blocks: bool,
    ) -> Tensor:
        compare = self.ops.redundancy_in_block if within_blocks else self.ops.redundancy
        return self._each(
            lambda i, cache: compare(cache, block_ids[i], start, live_tokens, threshold)
        )

    def superseded(self, block_ids: Tensor, start: int, live_tokens: int) -> Tensor:
        return self._each(
            lambda i, cache: self.ops.superseded(cache, block_ids[i], start, live_tokens)
        )

    def key_norms(self, block_ids: Tensor, live_tokens: int) -> Tensor:
        return self._each(lambda i, cache: self.ops.key_norms(cache, block_ids[i], live_tokens))

    def keys(self, block_ids: Tensor, live_tokens: int) -> Tensor:
        return self._dense(self.caches.layout.keys, block_ids, live_tokens)

    def values(self, block_ids: Tensor, live_tokens: int) -> Tensor:
        return self._dense(self.caches.layout.values, block_ids, live_tokens)

    def _dense(
        self, view: Callable[[Tensor], Tensor], block_ids: Tensor, live_tokens: int
    ) -> Tensor:
        return self._each(
            lambda i, cache: layouts.gather(view(cache), block_ids[i])[:, :live_tokens]
        )

    def block_max(self, scores: Tensor, block_size: int) -> Tensor:
        return self.ops.block_max(scores, block_size)

    def topk_keep(self, scores: Tensor, count: int) -> Tensor:
        return self.ops.topk_keep(scores, count)

    def compact(
        self, source_ids: Tensor, target_ids: Tensor, target_places: Tensor, keep: Tensor
    ) -> None:
        planes: Sequence[Tensor | None] = self.caches.planes or [None] * self.caches.num_layers
        for i, cache in enumerate(self.caches.kv_caches):
            self.ops.compact(cache, planes[i], source_ids[i], target_ids[i], keep[i])

    def global_scores(
        self, formula: GlobalScore, views: Sequence[View], memory: BlockMemory | None
    ) -> list[Tensor]:
        raise NotImplementedError(f"{self.name} scores one request at a time")

    def _each(self, compute: Callable[[int, Tensor], Tensor]) -> Tensor:
        return torch.stack([compute(i, cache) for i, cache in enumerate(self.caches.kv_caches)])
