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

    group: int
    """Its KV cache group: layers of different groups keep the same logical blocks elsewhere."""
    kv_cache: Tensor
    ring: QueryRing
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float


GatherKeys = Callable[[Tensor, Tensor], Tensor]
BlockTables = Callable[[str, int], list[int]]
"""A request's block table in a KV cache group, 0 where it has a hole."""


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
        shapes = {(x.kv_heads, x.head_dim, x.scale, x.softcap) for x in layers}
        if len(shapes) > 1:
            raise ValueError(
                "a KV policy scores all full-attention layers together, but they differ in "
                f"(KV heads, head size, scale, soft cap): {sorted(shapes)}"
            )
        self.history = torch.zeros(slots, len(layers), kv_heads, max_blocks)

    def reset(self, slots: list[int]) -> None:
        """These slots belong to other requests now."""
        self.history[slots] = 0

    def score(self, observed: dict[str, Observation], tables: BlockTables) -> BlockScores:
        """Score every observed request."""
        started = time.perf_counter()
        scores: dict[str, tuple[int, Sequence[float]]] = {
            request_id: (seen.epoch, self._score_one(request_id, seen, tables))
            for request_id, seen in observed.items()
        }
        return BlockScores(scores, time.perf_counter() - started)

    def _score_one(self, request_id: str, seen: Observation, tables: BlockTables) -> list[float]:
        used = blocks_for(seen.num_tokens, self.block_size)
        first_table = tables(request_id, self.layers[0].group)
        live = [block for block in range(used) if first_table[block]]  # in every group the same
        live_tokens = seen.num_tokens - (used - len(live)) * self.block_size
        history, columns = self.history[seen.slot], torch.tensor(live)
        for layers in self._layer_ranges(len(live)):
            table = tables(request_id, self.layers[layers.start].group)
            ids = torch.tensor([table[block] for block in live])
            view = self._view(seen, layers, ids, live_tokens, history[layers, :, columns])
            history[layers, :, columns] = self.policy.score(view)
        by_block = torch.zeros(used)
        by_block[columns] = self.policy.combine(history[:, :, columns])
        return by_block.tolist()

    def _layer_ranges(self, num_blocks: int) -> list[slice]:
        """Runs of layers of one group whose keys fit in GATHER_BYTES."""
        layer = self.layers[0]
        per_layer = 4 * num_blocks * self.block_size * layer.kv_heads * layer.head_dim
        most = max(1, GATHER_BYTES // max(1, per_layer))
        ranges, start = [], 0
        for i in range(1, len(self.layers) + 1):
            ends = i == len(self.layers) or self.layers[i].group != self.layers[start].group
            if ends or i - start == most:
                ranges.append(slice(start, i))
                start = i
        return ranges

    def _view(
        self,
        seen: Observation,
        chosen: slice,
        ids: Tensor,
        live_tokens: int,
        history: Tensor,
    ) -> LayerView:
        layers = self.layers[chosen]
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
