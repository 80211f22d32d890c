# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The operators as Triton kernels (`triton_kernels/`), for all layers in one launch.

What has no kernel of its own runs in torch on the device: pooling, block maxima and what `restated`
and `span` make of scores, a few calls for all layers of a request, and dense copies of the keys,
which no policy of this package asks for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gkv_vllm.ops import reference
from gkv_vllm.ops.layers import EachLayer, LayerCaches, LayerOps
from gkv_vllm.ops.layout import GPULayout, Layout
from gkv_vllm.ops.paged import ReferenceOps
from gkv_vllm.ops.upload import upload
from gkv_vllm.triton_kernels import (
    attention_mass,
    compact,
    key_norms,
    redundancy,
    score,
    topk,
    window_queries,
)
from gkv_vllm.triton_kernels import live_table as live_tables
from gkv_vllm.triton_kernels.paged import PagedLayers, pointers
from gkv_vllm.triton_kernels.requests import DueRequests

if TYPE_CHECKING:
    from gkv_vllm.policies.base import GlobalScore
    from gkv_vllm.policies.view import View
    from gkv_vllm.worker.scorer import BlockMemory


class TritonOps(ReferenceOps):
    """Step operators as kernels; `bind` gives those over all layers."""

    name = "triton"

    def __init__(self, layout: Layout | None = None) -> None:
        super().__init__(layout or GPULayout())

    def bind(self, caches: LayerCaches) -> LayerOps:
        return TritonLayerOps(self, caches)

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
        if places is None:
            live_tables.squeeze_live_table(
                block_table,
                seq_lens,
                block_size=block_size,
                live_table=live_table,
                live_lens=live_lens,
            )
            return
        live_tables.prepare_step(
            block_table,
            seq_lens,
            query_starts,
            slots,
            block_size=block_size,
            window=window,
            live_table=live_table,
            live_lens=live_lens,
            places=places,
        )

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
        attention_mass.attention_mass(
            *(queries, self.layout.keys(kv_cache), plane),
            *(live_table, live_lens, query_starts, protected),
            scale=scale,
            softcap=softcap,
        )

    def store_window_queries(self, queries: Tensor, places: Tensor, ring: Tensor) -> None:
        window_queries.store_window_queries(queries, places, ring)


class TritonLayerOps(EachLayer):
    """One launch for all layers, and for G-KV's scores one for all due requests too."""

    fuses = True

    @cached_property
    def layers(self) -> PagedLayers:
        caches, layout = self.caches.kv_caches, self.caches.layout
        return PagedLayers.of([layout.keys(x) for x in caches], [layout.values(x) for x in caches])

    @cached_property
    def _planes(self) -> Tensor | None:
        planes = self.caches.planes
        return pointers(planes) if planes is not None else None

    # ---- one request

    def local_scores(
        self,
        queries: Tensor,
        block_ids: Tensor,
        live_tokens: int,
        scale: float,
        softcap: float,
        form: str,
    ) -> Tensor:
        due = self._alone(block_ids, live_tokens, 0, queries.shape[2])
        (scores,) = score.local_scores(
            queries[:, None].contiguous(),
            self.layers,
            due,
            scale=scale,
            softcap=softcap,
            form=form,
        )
        return scores

    def redundancy(
        self,
        block_ids: Tensor,
        start: int,
        live_tokens: int,
        threshold: float,
        within_blocks: bool,
    ) -> Tensor:
        due = self._alone(block_ids, live_tokens, start, 1)
        (similarity,) = redundancy.redundancy(
            self.layers, due, threshold=threshold, within_blocks=within_blocks
        )
        return similarity

    def superseded(self, block_ids: Tensor, start: int, live_tokens: int) -> Tensor:
        (cosines,) = redundancy.superseded(
            self.layers, self._alone(block_ids, live_tokens, start, 1)
        )
        return cosines

    def key_norms(self, block_ids: Tensor, live_tokens: int) -> Tensor:
        return key_norms.key_norms(self.layers, block_ids, live_tokens)

    def topk_keep(self, scores: Tensor, count: int) -> Tensor:
        return topk.topk_keep(scores.contiguous(), count)

    def compact(
        self, source_ids: Tensor, target_ids: Tensor, target_places: Tensor, keep: Tensor
    ) -> None:
        compact.compact(
            self.layers, self._planes, source_ids, target_ids, keep, target_places=target_places
        )

    def _alone(self, block_ids: Tensor, live_tokens: int, start: int, window: int) -> DueRequests:
        """One request of which nothing is said but where its tokens are."""
        block_size = self.layers.block_size
        tables, table_of_layer = self._tables([block_ids])
        return DueRequests.of(
            tables,
            table_of_layer,
            live_tokens=[live_tokens],
            protected=[start],
            num_candidates=[block_size],
            remembered=[0],
            window=window,
            block_size=block_size,
        )

    # ---- all due requests

    def global_scores(
        self, formula: GlobalScore, views: Sequence[View], memory: BlockMemory | None
    ) -> list[Tensor]:
        """G-KV's scores, and its history renewed in place: [layers, kv_heads, units] per request.

        memory: where block granularity keeps its history; tokens have theirs in the planes."""
        first = views[0]
        tables, table_of_layer = self._tables([view.block_ids for view in views])
        due = DueRequests.of(
            tables,
            table_of_layer,
            live_tokens=[view.live_tokens for view in views],
            protected=[view.protected for view in views],
            num_candidates=[view.num_candidates for view in views],
            remembered=[view.remembered for view in views],
            window=first.window,
            block_size=first.block_size,
        )
        queries = torch.stack([x.queries for x in views if x.queries is not None], 1)
        numbers = {
            "scale": first.scale,
            "softcap": first.softcap,
            "alpha": formula.alpha,
            "summed": formula.history == "sum",
        }
        if memory is None:
            assert self._planes is not None
            importance = score.score_tokens(queries, self.layers, due, self._planes, **numbers)
        else:
            slots = upload(memory.slots, self.caches.device, torch.int32)
            logical = self._logical(memory.candidates, tables.shape[0])
            importance = score.score_blocks(
                queries, self.layers, due, memory.history, slots, logical, **numbers
            )
        scores = self._mix(formula, importance, due, first.unit)
        if formula.restated < 1.0 and formula.score_weight < 1.0:
            scores = [
                of_request
                - (1 - formula.score_weight)
                * view.units(view.restated(formula.restated, cosines), by="mean")
                for of_request, view, cosines in zip(
                    scores, views, redundancy.superseded(self.layers, due), strict=True
                )
            ]
        return [reference.lift(of_request, formula.span, first.unit) for of_request in scores]

    def _mix(
        self, formula: GlobalScore, importance: list[Tensor], due: DueRequests, unit: int
    ) -> list[Tensor]:
        if formula.redundancy == "none" or formula.score_weight == 1.0:
            return importance
        similarity = redundancy.redundancy(
            self.layers,
            due,
            threshold=formula.threshold,
            within_blocks=formula.redundancy == "block",
        )
        return redundancy.mix_scores(
            importance,
            similarity,
            due,
            score_weight=formula.score_weight,
            temperature=formula.temperature,
            unit=unit,
        )

    def _tables(self, block_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Tables [tables, requests, blocks] int32, and which is each layer's.

        Where all layers are in one KV cache group there is one, else one per layer."""
        layers = self.caches.num_layers
        shared = block_ids[0].stride(0) == 0 or layers == 1
        count = 1 if shared else layers
        width = max(ids.shape[1] for ids in block_ids)
        size = (count, len(block_ids), width)
        tables = torch.zeros(size, dtype=torch.int32, device=self.caches.device)
        for i, ids in enumerate(block_ids):
            tables[:, i, : ids.shape[1]] = ids[:count]
        own = [0] * layers if shared else list(range(layers))
        return tables, upload(own, self.caches.device, torch.int32)

    def _logical(self, candidates: Sequence[Sequence[Sequence[int]]], tables: int) -> Tensor:
        """The candidates' logical blocks, padded: [tables, requests, candidates] int32.

        candidates: per request and layer (one for all where they agree)."""
        width = max(len(of_layer) for request in candidates for of_layer in request)
        rows = [
            [*request[table % len(request)], *[0] * (width - len(request[table % len(request)]))]
            for table in range(tables)
            for request in candidates
        ]
        numbers = upload([n for row in rows for n in row], self.caches.device, torch.int32)
        return numbers.view(tables, len(candidates), width)
