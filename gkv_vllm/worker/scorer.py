# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Asks the policy what stays: block scores for the planner, or tokens that are moved at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gkv_vllm.engine.footprint import blocks_for
from gkv_vllm.engine.plan import Compaction, Selection
from gkv_vllm.ops.layers import LayerCaches, LayerOps
from gkv_vllm.ops.paged import PagedOps
from gkv_vllm.ops.upload import to_host, upload
from gkv_vllm.policies.base import Policy
from gkv_vllm.policies.view import View
from gkv_vllm.worker.layers import EvictedLayer
from gkv_vllm.worker.ranks import Ranks
from gkv_vllm.worker.rings import QueryRings, RingIndex

BlockTable = Callable[[int], Tensor]
"""A request's block table by KV cache group, as `RunnerAdapter.row` gives it."""


@dataclass(frozen=True)
class BlockMemory:
    """Where block granularity keeps what a policy remembers of the requests that are scored."""

    history: Tensor
    """[slots, layers, kv_heads, blocks] float32, by logical block"""
    slots: list[int]
    """Of each request."""
    candidates: list[Sequence[Sequence[int]]]
    """The candidates of each request in each layer, or once if all layers agree."""


class Scorer:
    """Keeps what the policy remembers, and applies it to the requests that are due."""

    def __init__(
        self,
        policy: Policy,
        layers: list[EvictedLayer],
        ops: PagedOps,
        *,
        window: int,
        block_size: int,
        moves_tokens: bool,
        scope: str,
        slots: int,
        max_blocks: int,
        rings: QueryRings | None = None,
        ring_index: RingIndex | None = None,
        ranks: Ranks | None = None,
        together: int = 0,
    ) -> None:
        """together: live tokens of requests that are scored at once; 0 scores one at a time."""
        self.policy = policy
        self.layers = layers
        planes = tuple(layer.plane for layer in layers if layer.plane is not None)
        self.ranks = ranks or Ranks()
        self.ops: LayerOps = ops.bind(
            LayerCaches(
                tuple(layer.kv_cache for layer in layers),
                ops.layout,
                planes or None,
                first_head=self.ranks.first_head,
                model_heads=self.ranks.kv_heads,
            )
        )
        self.rings = rings
        self.ring_index = ring_index
        self.together = together
        self.device = layers[0].kv_cache.device
        self.kv_groups = sorted({layer.kv_group for layer in layers})
        self.window = window
        self.block_size = block_size
        self.moves_tokens = moves_tokens
        self.scope = scope
        shapes = {(x.kv_heads, x.head_dim, x.scale, x.softcap) for x in layers}
        if len(shapes) > 1:
            raise ValueError(
                "a KV policy scores all full-attention layers together, but they differ in "
                f"(KV heads, head size, scale, soft cap): {sorted(shapes)}"
            )
        of_layer = [layer.layer_group for layer in layers]
        self.layer_groups = [
            upload([i for i, of in enumerate(of_layer) if of == group], self.device)
            for group in sorted(set(of_layer))
        ]
        self.kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        """What recorded compactions kept, as `WorkerReport.kept`, since the last report."""
        self.history: Tensor | None = None
        """Block granularity: [slots, layers, kv_heads, blocks], by logical block."""
        if policy.needs.history and not moves_tokens:
            size = (slots, len(layers), layers[0].kv_heads, max_blocks)
            self.history = torch.zeros(size, device=self.device)

    def reset(self, slots: list[int]) -> None:
        """These slots belong to other requests now."""
        if self.history is not None and slots:
            self.history[upload(slots, self.device)] = 0

    # ---- block granularity

    def block_scores(self, observed: Sequence[tuple[Selection, BlockTable]]) -> list[Tensor]:
        """One score for each candidate block of each request: [layer_groups, candidates]."""
        combine = self.policy.combine
        combined = [
            torch.stack([combine(scores[members].flatten(0, 1)) for members in self.layer_groups])
            for chunk in self._chunks(observed)
            for scores, _ in self._score(chunk)
        ]
        return self.ranks.agree(combined, self.policy.combine_ranks)

    # ---- token granularity

    def compact(self, orders: Sequence[tuple[Compaction, BlockTable]]) -> None:
        """Move the surviving tokens of these requests into their target blocks, in every layer.

        Must come before anything of this step is written into a block."""
        # Window and tail may fill a budget: then every candidate goes, and nothing moves.
        tables = {id(order.selection): (order, table) for order, table in orders if order.targets}
        due = [(order.selection, table) for order, table in tables.values()]
        for chunk in self._chunks(due):
            scored = self._score(chunk)
            shared = [self._share(scores) for scores, _ in scored]
            if self.scope != "head":
                shared = self.ranks.agree(shared, self.policy.combine_ranks)
            for (seen, _), (_, view), scores in zip(chunk, scored, shared, strict=True):
                self._move(*tables[id(seen)], view, scores)

    def _share(self, scores: Tensor) -> Tensor:
        """The scores that decide: [layers or 1, kv_heads or 1, units]."""
        if self.scope == "head":
            return scores
        if self.scope == "layer":
            return self.policy.combine(scores)[:, None]
        return self.policy.combine(scores.flatten(0, 1))[None, None]

    def _move(self, order: Compaction, table: BlockTable, view: View, scores: Tensor) -> None:
        chosen = self.ops.topk_keep(scores, view.keep)
        if order.record is not None:
            self.kept[order.record] = to_host(chosen), to_host(scores)
        keep = chosen.expand(len(self.layers), -1, -1)
        renewed = set().union(*order.fresh.values())
        place_of = {block: i for i, block in enumerate(order.selection.candidates[0])}
        places = [-1 if block in renewed else place_of[block] for block in order.targets]
        sources = self._candidates(order.selection, view.block_ids)
        self.ops.compact(sources, self._targets(order, table), upload(places, self.device), keep)

    def _targets(self, order: Compaction, table: BlockTable) -> Tensor:
        """The ids of the target blocks in each layer: [layers, targets] int64."""
        blocks, by_group = upload(order.targets, self.device), {}
        for group in self.kv_groups:
            ids = table(group)[blocks].long()
            if fresh := order.fresh.get(group):
                new = [i for i, block in enumerate(order.targets) if block in fresh]
                of_new = upload([fresh[order.targets[i]] for i in new], self.device)
                ids[upload(new, self.device)] = of_new
            by_group[group] = ids
        return self._each_layer(by_group)

    # ---- both

    def _chunks(
        self, due: Sequence[tuple[Selection, BlockTable]]
    ) -> Iterator[list[tuple[Selection, BlockTable]]]:
        """Requests that are scored together: as many as the work space was sized for."""
        chunk: list[tuple[Selection, BlockTable]] = []
        tokens = 0
        for seen, table in due:
            if chunk and tokens + seen.num_tokens > self.together:
                yield chunk
                chunk, tokens = [], 0
            chunk.append((seen, table))
            tokens += seen.num_tokens
        if chunk:
            yield chunk

    def _locate(self, seen: Selection, table: BlockTable) -> Tensor:
        """The ids of a request's live blocks in each layer, in order: [layers, blocks] int64."""
        used = blocks_for(seen.num_tokens, self.block_size)
        recent = range((seen.num_tokens - self.window) // self.block_size, used)
        live = [
            upload([*range(seen.protected), *candidates, *recent], self.device)
            for candidates in seen.candidates
        ]
        layer_group = {layer.kv_group: layer.layer_group for layer in self.layers}
        return self._each_layer(
            {group: table(group)[live[layer_group[group]]].long() for group in self.kv_groups}
        )

    def _candidates(self, seen: Selection, block_ids: Tensor) -> Tensor:
        return block_ids[:, seen.protected :][:, : len(seen.candidates[0])]

    def _each_layer(self, by_group: dict[int, Tensor]) -> Tensor:
        """Block ids by KV cache group as [layers, blocks]; one copy in memory if there is one."""
        if len(by_group) == 1:
            return by_group[self.kv_groups[0]].expand(len(self.layers), -1)
        return torch.stack([by_group[layer.kv_group] for layer in self.layers])

    def _score(self, due: list[tuple[Selection, BlockTable]]) -> list[tuple[Tensor, View]]:
        """Per request the scores [layers, kv_heads, units], and the view that they come from."""
        views = [self._view(seen, table) for seen, table in due]
        formula = self.policy.global_score() if self.ops.fuses else None
        if formula is None:
            return [self._score_one(seen, view) for (seen, _), view in zip(due, views, strict=True)]
        memory = None
        if self.history is not None:
            memory = BlockMemory(self.history, *self._remembered([seen for seen, _ in due]))
        scores = self.ops.global_scores(formula, views, memory)
        return list(zip(scores, views, strict=True))

    def _remembered(
        self, due: Sequence[Selection]
    ) -> tuple[list[int], list[Sequence[Sequence[int]]]]:
        of_layer = [layer.layer_group for layer in self.layers]
        groups = of_layer if len(self.layer_groups) > 1 else of_layer[:1]
        slots = [seen.slot for seen in due if seen.slot is not None]
        return slots, [[seen.candidates[group] for group in groups] for seen in due]

    def _score_one(self, seen: Selection, view: View) -> tuple[Tensor, View]:
        if self.policy.needs.history:
            view = replace(view, history=self._recall(seen, view))
            view = replace(view, history=self.policy.update(view))
            assert view.history is not None
            self._remember(seen, view, view.history)
        return self.policy.score(view), view

    def _view(self, seen: Selection, table: BlockTable) -> View:
        first, unit = self.layers[0], 1 if self.moves_tokens else self.block_size
        num_blocks = len(seen.candidates[0])
        gone = seen.candidates[0][-1] + 1 - seen.protected - num_blocks
        return View(
            ops=self.ops,
            block_ids=self._locate(seen, table),
            queries=self._window_queries(seen) if self.policy.needs.queries else None,
            history=None,
            scale=first.scale,
            softcap=first.softcap,
            window=self.window,
            live_tokens=seen.num_tokens - gone * self.block_size,
            protected=seen.protected * self.block_size,
            num_candidates=num_blocks * self.block_size,
            keep=seen.keep * self.block_size // unit,
            remembered=seen.remembered * self.block_size // unit,
            block_size=self.block_size,
            unit=unit,
            event=seen.event,
            key=seen.key,
        )

    def _window_queries(self, seen: Selection) -> Tensor:
        assert self.rings is not None
        assert self.ring_index is not None
        assert seen.slot is not None
        return self.rings.read(self.ring_index.window_of(seen.slot, seen.num_tokens))

    def _recall(self, seen: Selection, view: View) -> Tensor:
        """What the policy's `update` returned at the last eviction, for what stayed since."""
        if self.history is not None:
            assert seen.slot is not None
            return self.history[seen.slot].gather(-1, self._logical(seen))
        history = self.ops.caches.read_planes(self._candidates(seen, view.block_ids))
        history[..., seen.remembered * self.block_size :] = 0
        return history

    def _remember(self, seen: Selection, view: View, history: Tensor) -> None:
        if self.history is not None:
            assert seen.slot is not None
            self.history[seen.slot].scatter_(-1, self._logical(seen), history)
        else:
            self.ops.caches.write_planes(self._candidates(seen, view.block_ids), history)

    def _logical(self, seen: Selection) -> Tensor:
        """The candidates of each layer and head, by logical block: [layers, kv_heads, blocks]."""
        by_group = [upload(candidates, self.device) for candidates in seen.candidates]
        by_layer = torch.stack([by_group[layer.layer_group] for layer in self.layers])
        return by_layer[:, None].expand(-1, self.layers[0].kv_heads, -1)


def ring_bytes(*, layers: int, query_heads: int, head_dim: int, window: int, itemsize: int) -> int:
    """What the query rings of one slot cost."""
    return layers * window * query_heads * head_dim * itemsize


def history_bytes(*, layers: int, kv_heads: int, max_blocks: int) -> int:
    """What the block history of one slot costs (float32)."""
    return 4 * layers * kv_heads * max_blocks


def plane_bytes(*, layers: int, kv_heads: int, block_size: int) -> int:
    """What one number per token costs for each KV block (float32)."""
    return 4 * layers * kv_heads * block_size
