# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""A paged cache on the device, and requests in it that are due; measures nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from gpu.common import Model
from torch import Tensor

from gkv_vllm.ops.layers import LayerCaches, LayerOps
from gkv_vllm.ops.layout import GPULayout
from gkv_vllm.ops.upload import upload
from gkv_vllm.policies.view import View

DTYPE = torch.bfloat16
FILLED_AT_ONCE = 1024


class Pool:
    """The KV caches of all layers as FLASH_ATTN lays them out (NHD), with a plane beside each."""

    def __init__(self, model: Model, num_blocks: int, device: str) -> None:
        self.model, self.num_blocks = model, num_blocks
        self.device = torch.device(device)
        size = (num_blocks, model.block_size, model.kv_heads, 2 * model.head_dim)
        self.caches = LayerCaches(
            tuple(
                torch.zeros(size, dtype=DTYPE, device=device).transpose(1, 2)
                for _ in range(model.layers)
            ),
            GPULayout(),
            tuple(
                torch.zeros(
                    model.layers, num_blocks, model.kv_heads, model.block_size, device=device
                )
            ),
        )
        self.draw = torch.Generator(device).manual_seed(0)
        # Block 0 is the null block. Blocks of one request are scattered, as in a server that runs.
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(0))
        self.order = (order + 1).int()

    def fill(self, spread: float) -> None:
        """Keys around a few directions per head, the closer the smaller `spread`; any values.

        The same numbers for the same pool and spread."""
        model = self.model
        self.draw.manual_seed(0)
        for cache in self.caches.kv_caches:
            centres = self._normal(8, model.kv_heads, 1, model.head_dim)
            for start in range(0, self.num_blocks, FILLED_AT_ONCE):
                part = cache[start : start + FILLED_AT_ONCE]
                of_block = torch.randint(8, (len(part),), generator=self.draw, device=self.device)
                keys = self.caches.layout.keys(part)
                keys.copy_(centres[of_block] + spread * self._normal(*keys.shape))
                values = self.caches.layout.values(part)
                values.copy_(self._normal(*values.shape))

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=DTYPE, device=self.device, generator=self.draw)


@dataclass(frozen=True)
class Batch:
    """Requests of equal length that fall due together, each with blocks of its own."""

    pool: Pool
    requests: int
    live_tokens: int
    ids: Tensor | None = None
    """[requests, blocks] int32: their live blocks, where it matters which these are."""
    window_queries: Tensor | None = None
    """[layers, requests, query_heads, window, head_dim], where it matters what these are."""

    @property
    def model(self) -> Model:
        return self.pool.model

    @property
    def blocks(self) -> int:
        """Of one request."""
        return math.ceil(self.live_tokens / self.model.block_size)

    @property
    def candidate_blocks(self) -> int:
        model = self.model
        return (self.live_tokens - model.window - model.protected) // model.block_size

    @property
    def keep_blocks(self) -> int:
        """What is left of the candidates: an event takes `interval` tokens."""
        return self.candidate_blocks - self.model.interval // self.model.block_size

    @property
    def scale(self) -> float:
        return self.model.head_dim**-0.5

    @cached_property
    def tables(self) -> Tensor:
        """[1, requests, blocks] int32: one KV cache group for all layers."""
        ids = self.ids
        if ids is None:
            ids = self.pool.order[: self.requests * self.blocks]
        return ids.view(1, self.requests, self.blocks).to(self.pool.device)

    @cached_property
    def table_of_layer(self) -> Tensor:
        return torch.zeros(self.model.layers, dtype=torch.int32, device=self.pool.device)

    @cached_property
    def queries(self) -> Tensor:
        """[layers, requests, query_heads, window, head_dim]"""
        if self.window_queries is not None:
            return self.window_queries
        model = self.model
        size = (model.layers, self.requests, model.query_heads, model.window, model.head_dim)
        return self.pool._normal(*size)

    def block_ids(self, request: int) -> Tensor:
        """[layers, blocks] int64, one row in memory."""
        return self.tables[0, request].long().expand(self.model.layers, -1)

    def view(self, request: int, ops: LayerOps, *, history: Tensor | None = None) -> View:
        """What a policy sees of a request that is due, in tokens."""
        size = self.model.block_size
        return View(
            ops=ops,
            block_ids=self.block_ids(request),
            queries=self.queries[:, request],
            history=history,
            scale=self.scale,
            softcap=0.0,
            window=self.model.window,
            live_tokens=self.live_tokens,
            protected=self.model.protected,
            num_candidates=self.candidate_blocks * size,
            keep=self.keep_blocks * size,
            remembered=self.keep_blocks * size,
            block_size=size,
            unit=1,
            event=1,
            key=0,
        )

    def move(self, ops: LayerOps, request: int, keep: Tensor) -> None:
        """Compaction of a request as the worker does it: into its first candidate blocks."""
        ids = self.block_ids(request)
        first = self.model.protected // self.model.block_size
        sources = ids[:, first : first + self.candidate_blocks]
        places = upload(list(range(self.keep_blocks)), self.pool.device)
        ops.compact(sources, sources[:, : self.keep_blocks], places, keep)


def blocks_that_fit(model: Model, device: str, reserve: int, most: int) -> int:
    """How many blocks, planes included, leave `reserve` bytes of the device free; up to `most`."""
    if device == "cpu":
        return most
    free, _ = torch.cuda.mem_get_info()
    bytes_each = model.cache_bytes(model.block_size) + model.plane_bytes(model.block_size)
    return min(most, (free - reserve) // bytes_each)


def most_blocks(model: Model, combinations: Sequence[tuple[int, int]]) -> int:
    """What the largest of these (requests, live tokens) takes, and the null block."""
    return 1 + max(n * math.ceil(live / model.block_size) for n, live in combinations)
