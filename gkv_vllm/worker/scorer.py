# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Asks the policy what stays: block scores for the planner, or tokens that are moved at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gkv_vllm.engine.footprint import blocks_for
from gkv_vllm.engine.plan import Compaction, Selection
from gkv_vllm.ops.paged import PagedOps
from gkv_vllm.ops.upload import upload
from gkv_vllm.policies.base import Policy
from gkv_vllm.policies.view import LayerCache, View
from gkv_vllm.worker.layers import EvictedLayer

BlockTable = Callable[[int], Tensor]
"""A request's block table by KV cache group, as `RunnerAdapter.row` gives it."""


@dataclass(frozen=True)
class Place:
    """Where one request's live tokens are: block ids, one tensor for each KV cache group."""

    live: dict[int, Tensor]
    candidates: dict[int, Tensor]


class Scorer:
    """Keeps what the policy remembers, and applies it to one request at a time."""

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
    ) -> None:
        self.policy = policy
        self.layers = layers
        self.ops = ops
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
        self.layer_groups = [
            [i for i, layer in enumerate(layers) if layer.layer_group == group]
            for group in sorted({layer.layer_group for layer in layers})
        ]
        self.history: Tensor | None = None
        """Block granularity: [slots, layers, kv_heads, blocks], by logical block."""
        if policy.needs.history and not moves_tokens:
            self.history = torch.zeros(slots, len(layers), layers[0].kv_heads, max_blocks)

    def reset(self, slots: list[int]) -> None:
        """These slots belong to other requests now."""
        if self.history is not None:
            self.history[slots] = 0

    # ---- block granularity

    def block_scores(self, seen: Selection, table: BlockTable) -> list[Sequence[float]]:
        """Per layer group one score for each candidate block of an observed request."""
        scores, _ = self._score(seen, self._locate(seen, table))
        return [
            self.policy.combine(scores[members].flatten(0, 1)).tolist()
            for members in self.layer_groups
        ]

    # ---- token granularity

    def compact(self, order: Compaction, table: BlockTable) -> None:
        """Move the surviving tokens of a request into its target blocks, in every layer.

        Must come before anything of this step is written into a block."""
        seen = order.selection
        if not order.targets:  # window and tail fill the budget: every candidate goes
            return
        place = self._locate(seen, table)
        scores, view = self._score(seen, place)
        if self.scope == "layer":
            scores = self.policy.combine(scores)[:, None]
        elif self.scope == "all":
            scores = self.policy.combine(scores.flatten(0, 1))[None, None]
        keep = self.ops.topk_keep(scores, view.keep).expand(len(self.layers), -1, -1)
        targets = {}
        for group in place.live:
            ids = table(group)[self._upload(order.targets)].long()
            fresh = order.fresh.get(group, {})
            if fresh:
                new = [i for i, block in enumerate(order.targets) if block in fresh]
                ids[self._upload(new)] = self._upload([fresh[order.targets[i]] for i in new])
            targets[group] = ids
        for layer, kept in zip(self.layers, keep, strict=True):
            self.ops.compact(
                layer.kv_cache,
                layer.plane,
                place.candidates[layer.kv_group],
                targets[layer.kv_group],
                kept,
            )

    # ---- both

    def _upload(self, values: Sequence[int]) -> Tensor:
        return upload(values, self.layers[0].kv_cache.device)

    def _locate(self, seen: Selection, table: BlockTable) -> Place:
        used = blocks_for(seen.num_tokens, self.block_size)
        recent = range((seen.num_tokens - self.window) // self.block_size, used)
        place = Place({}, {})
        for layer in self.layers:
            if layer.kv_group in place.live:
                continue
            candidates = seen.candidates[layer.layer_group]
            live = self._upload([*range(seen.protected), *candidates, *recent])
            ids = table(layer.kv_group)[live].long()
            place.live[layer.kv_group] = ids
            place.candidates[layer.kv_group] = ids[seen.protected :][: len(candidates)]
        return place

    def _score(self, seen: Selection, place: Place) -> tuple[Tensor, View]:
        """Scores [layers, kv_heads, units], and the view that they come from."""
        view = self._view(seen, place)
        if self.policy.needs.history:
            view = replace(view, history=self._recall(seen, place))
            view = replace(view, history=self.policy.update(view))
            assert view.history is not None
            self._remember(seen, place, view.history)
        return self.policy.score(view), view

    def _view(self, seen: Selection, place: Place) -> View:
        first, unit = self.layers[0], 1 if self.moves_tokens else self.block_size
        num_blocks = len(seen.candidates[0])
        gone = seen.candidates[0][-1] + 1 - seen.protected - num_blocks
        return View(
            ops=self.ops,
            layers=[LayerCache(x.kv_cache, place.live[x.kv_group], x.plane) for x in self.layers],
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
        rings = [layer.ring for layer in self.layers if layer.ring is not None]
        assert seen.slot is not None
        places = rings[0].index.window_of(seen.slot, seen.num_tokens)
        return torch.stack([ring.read(places) for ring in rings])

    def _recall(self, seen: Selection, place: Place) -> Tensor:
        """What the policy's `update` returned at the last eviction, for what stayed since."""
        if self.history is not None:
            return torch.stack(
                [
                    self.history[seen.slot, i][:, seen.candidates[layer.layer_group]]
                    for i, layer in enumerate(self.layers)
                ]
            )
        planes = [
            layer.plane[place.candidates[layer.kv_group]].transpose(0, 1).flatten(1)
            for layer in self.layers
            if layer.plane is not None
        ]
        history = torch.stack(planes)
        history[..., seen.remembered * self.block_size :] = 0
        return history

    def _remember(self, seen: Selection, place: Place, history: Tensor) -> None:
        for i, layer in enumerate(self.layers):
            if self.history is not None:
                self.history[seen.slot, i][:, seen.candidates[layer.layer_group]] = history[i]
            else:
                assert layer.plane is not None
                ids = place.candidates[layer.kv_group]
                by_block = history[i].unflatten(-1, (-1, self.block_size))
                layer.plane[ids] = by_block.transpose(0, 1)


def ring_bytes(*, layers: int, query_heads: int, head_dim: int, window: int, itemsize: int) -> int:
    """What the query rings of one slot cost."""
    return layers * window * query_heads * head_dim * itemsize


def history_bytes(*, layers: int, kv_heads: int, max_blocks: int) -> int:
    """What the block history of one slot costs (float32)."""
    return 4 * layers * kv_heads * max_blocks


def plane_bytes(*, layers: int, kv_heads: int, block_size: int) -> int:
    """What one number per token costs for each KV block (float32)."""
    return 4 * layers * kv_heads * block_size
