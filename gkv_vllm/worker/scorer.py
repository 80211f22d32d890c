# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Scores the blocks of observed requests with the policy; keeps the score history of each slot."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gkv_vllm.engine.footprint import blocks_for
from gkv_vllm.engine.plan import BlockScores, Observation
from gkv_vllm.policies.base import LayerView, Policy
from gkv_vllm.worker.rings import QueryRing

GATHER_BYTES = 64 << 20
"""Keys gathered at a time: as many layers as fit in this."""


@dataclass(slots=True)
class ScoredLayer:
    """One attention layer as the scorer sees it."""

    kv_cache: Tensor
    ring: QueryRing
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float


GatherKeys = Callable[[Tensor, Tensor], Tensor]


class BlockScorer:
    """`block_scores[slot, layer, kv_head, block]` and the step that renews it."""

    def __init__(
        self,
        policy: Policy,
        layers: list[ScoredLayer],
        gather_keys: GatherKeys,
        *,
        slots: int,
        max_blocks: int,
        block_size: int,
    ) -> None:
        self.policy = policy
        self.layers = layers
        self.gather_keys = gather_keys
        self.block_size = block_size
        kv_heads = layers[0].kv_heads
        if any(layer.kv_heads != kv_heads for layer in layers):
            raise ValueError("evictable layers with different numbers of KV heads")
        self.history = torch.zeros(slots, len(layers), kv_heads, max_blocks)

    def reset(self, slots: list[int]) -> None:
        """These slots belong to other requests now."""
        self.history[slots] = 0

    def score(
        self, observed: dict[str, Observation], block_ids: Callable[[str], list[int]]
    ) -> BlockScores:
        """Score every observed request. `block_ids`: a request's table, 0 where it has a hole."""
        started = time.perf_counter()
        scores: dict[str, tuple[int, Sequence[float]]] = {
            request_id: (seen.epoch, self._score_one(seen, block_ids(request_id)))
            for request_id, seen in observed.items()
        }
        return BlockScores(scores, time.perf_counter() - started)

    def _score_one(self, seen: Observation, table: list[int]) -> list[float]:
        used = table[: blocks_for(seen.num_tokens, self.block_size)]
        live = torch.tensor([i for i, block_id in enumerate(used) if block_id])
        ids = torch.tensor([block_id for block_id in used if block_id])
        live_tokens = seen.num_tokens - (len(used) - len(live)) * self.block_size
        history = self.history[seen.slot]
        for first, last in self._layer_ranges(len(ids)):
            view = self._view(first, last, seen, ids, live_tokens, history[first:last, :, live])
            history[first:last, :, live] = self.policy.score(view)
        by_block = torch.zeros(len(used))
        by_block[live] = self.policy.combine(history[:, :, live])
        return by_block.tolist()

    def _layer_ranges(self, num_blocks: int) -> list[tuple[int, int]]:
        layer = self.layers[0]
        per_layer = 4 * num_blocks * self.block_size * layer.kv_heads * layer.head_dim
        step = max(1, GATHER_BYTES // max(1, per_layer))
        return [(i, min(i + step, len(self.layers))) for i in range(0, len(self.layers), step)]

    def _view(
        self,
        first: int,
        last: int,
        seen: Observation,
        ids: Tensor,
        live_tokens: int,
        history: Tensor,
    ) -> LayerView:
        layers = self.layers[first:last]
        return LayerView(
            queries=torch.stack([x.ring.window_of(seen.slot, seen.num_tokens) for x in layers]),
            keys=torch.stack([self.gather_keys(x.kv_cache, ids)[:, :live_tokens] for x in layers]),
            scale=layers[0].scale,
            softcap=layers[0].softcap,
            block_size=self.block_size,
            history=history,
        )


def state_bytes_per_slot(
    *,
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    max_blocks: int,
    query_itemsize: int,
) -> int:
    """What one slot costs on the worker: its query rings and its float32 score history."""
    rings = layers * window * query_heads * head_dim * query_itemsize
    return rings + layers * kv_heads * max_blocks * 4
