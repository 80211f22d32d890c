# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Requests of different lengths in one fragmented paged cache, for kernels and for their oracle.

Whatever is not a live key of a request is NaN, and what it does not remember infinite: a maximum
may drop a NaN. The oracle is torch in float32: `GKV` over a `View`
of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from gkv_vllm.triton_kernels.paged import PagedLayers, pointers
from gkv_vllm.triton_kernels.requests import DueRequests
from torch import Tensor

from gkv_vllm.ops.layers import LayerCaches
from gkv_vllm.ops.layout import CPULayout, GPULayout
from gkv_vllm.ops.paged import ReferenceOps
from gkv_vllm.policies.view import View

NAN = float("nan")
INF = float("inf")


@dataclass(frozen=True)
class Shape:
    """A model, its cache, and requests: (live tokens, protected blocks, remembered blocks)."""

    requests: tuple[tuple[int, int, int], ...] = ((63, 0, 0), (130, 1, 3), (257, 2, 9))
    layers: int = 2
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    window: int = 7
    block_size: int = 16
    tables: int = 1
    softcap: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    layout: str = "NHD"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass
class World:
    """The caches of all layers with the live keys of every request in them."""

    shape: Shape
    device: torch.device
    seed: int = 0
    similar: float = 0.0
    """How much all keys of a head resemble each other; with 0 hardly any two do."""
    caches: LayerCaches = field(init=False)

    def __post_init__(self) -> None:
        shape = self.shape
        self.generator = torch.Generator().manual_seed(self.seed)
        self.blocks = [-(-live // shape.block_size) for live, _, _ in shape.requests]
        num_blocks = shape.tables * sum(self.blocks) + 3
        order = torch.randperm(num_blocks - 1, generator=self.generator) + 1
        width = max(self.blocks) + 1
        self.tables = torch.zeros(shape.tables, len(self.blocks), width, dtype=torch.int32)
        taken = iter(order.tolist())
        for table in range(shape.tables):
            for request, count in enumerate(self.blocks):
                ids = torch.tensor([next(taken) for _ in range(count)], dtype=torch.int32)
                self.tables[table, request, :count] = ids
        self.table_of_layer = torch.arange(shape.layers, dtype=torch.int32) % shape.tables
        planes = torch.full(
            (shape.layers, num_blocks, shape.kv_heads, shape.block_size), INF, device=self.device
        )
        self.planes = planes
        self.caches = LayerCaches(
            tuple(self._cache(num_blocks) for _ in range(shape.layers)),
            CPULayout() if shape.layout == "cpu" else GPULayout(),
            tuple(planes),
        )
        self.draw_keys()
        self.draw_queries()

    def _cache(self, num_blocks: int) -> Tensor:
        shape = self.shape
        last = 2 * shape.head_dim
        if shape.layout == "NHD":
            size = (num_blocks, shape.block_size, shape.kv_heads, last)
            cache = torch.full(size, NAN, dtype=shape.dtype, device=self.device)
            return cache.transpose(1, 2)
        size = (num_blocks, shape.kv_heads, shape.block_size, last)
        return torch.full(size, NAN, dtype=shape.dtype, device=self.device)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)

    def draw_keys(self) -> None:
        shape = self.shape
        for layer, table in enumerate(self.table_of_layer.tolist()):
            keys = self.caches.layout.keys(self.caches.kv_caches[layer])
            shared = self._normal(shape.kv_heads, 1, shape.head_dim) * self.similar
            for request, (live, _, _) in enumerate(shape.requests):
                drawn = self._normal(shape.kv_heads, live, shape.head_dim) + shared
                self.write(keys, self.tables[table, request], drawn)

    def write(self, blocks: Tensor, table: Tensor, tokens: Tensor) -> None:
        """The first live tokens [kv_heads, tokens, ...] of a request, where its table says."""
        size = self.shape.block_size
        for first in range(0, tokens.shape[1], size):
            part = tokens[:, first : first + size].to(blocks.dtype).to(self.device)
            blocks[int(table[first // size]), :, : part.shape[1]] = part

    def draw_queries(self) -> None:
        shape = self.shape
        heads = shape.kv_heads * shape.group
        drawn = self._normal(shape.layers, len(shape.requests), heads, shape.window, shape.head_dim)
        self.queries = drawn.to(shape.dtype).to(self.device)

    # ---- for the kernels

    def layers(self) -> PagedLayers:
        layout = self.caches.layout
        return PagedLayers.of(
            [layout.keys(x) for x in self.caches.kv_caches],
            [layout.values(x) for x in self.caches.kv_caches],
        )

    def due(self, unit: int = 1) -> DueRequests:
        """All requests; `remembered` counts units of so many tokens."""
        size = self.shape.block_size
        return DueRequests.of(
            self.tables.to(self.device),
            self.table_of_layer.to(self.device),
            live_tokens=[live for live, _, _ in self.shape.requests],
            protected=[protected * size for _, protected, _ in self.shape.requests],
            num_candidates=[self.candidates(i) for i in range(len(self.blocks))],
            remembered=[remembered * size // unit for _, _, remembered in self.shape.requests],
            window=self.shape.window,
            block_size=size,
        )

    def plane_pointers(self) -> Tensor:
        return pointers(list(self.planes))

    # ---- for the oracle

    def candidates(self, request: int) -> int:
        """Candidate tokens: the unprotected full blocks that end before the window."""
        live, protected, _ = self.shape.requests[request]
        size = self.shape.block_size
        return (live - self.shape.window) // size * size - protected * size

    def view(self, request: int, unit: int, history: Tensor | None = None) -> View:
        live, protected, remembered = self.shape.requests[request]
        ids = self.tables[self.table_of_layer.long(), request, : self.blocks[request]]
        return View(
            ops=ReferenceOps(self.caches.layout).bind(self.caches),
            block_ids=ids.long().to(self.device),
            queries=self.queries[:, request],
            history=history,
            scale=self.shape.scale,
            softcap=self.shape.softcap,
            window=self.shape.window,
            live_tokens=live,
            protected=protected * self.shape.block_size,
            num_candidates=self.candidates(request),
            keep=1,
            remembered=remembered * self.shape.block_size // unit,
            block_size=self.shape.block_size,
            unit=unit,
            event=1,
            key=0,
        )

    def views(self, unit: int, histories: Sequence[Tensor] | None = None) -> list[View]:
        """What a policy sees of each request, with these histories."""
        return [
            self.view(i, unit, None if histories is None else histories[i])
            for i in range(len(self.shape.requests))
        ]
