# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Requests that grow and lose tokens in one paged cache, under the real scorer, rings and layers.

What engine and vLLM do around a step is done here by hand, in plain sight. A request knows which
of its tokens each layer and head should hold; `Cache.check` compares that with the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from gkv_vllm.engine.plan import Compaction, Recording, Selection
from gkv_vllm.ops import paged
from gkv_vllm.ops.layout import CPULayout
from gkv_vllm.ops.paged import PagedOps
from gkv_vllm.policies.base import Policy
from gkv_vllm.policies.view import View
from gkv_vllm.worker.layers import EvictedLayer
from gkv_vllm.worker.mass import MassIndex
from gkv_vllm.worker.rings import QueryRings, RingIndex
from gkv_vllm.worker.scorer import Scorer

LAYOUT = CPULayout()
NAN = float("nan")
IMPLEMENTATIONS = ("reference", "cpu")
SLOTS = 4
MAX_TOKENS = 4096
CPU = torch.device("cpu")


def operators(name: str) -> PagedOps:
    """An implementation of the operators; skips the test where it is not installed."""
    try:
        return paged.resolve(name)
    except ValueError as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class Model:
    query_heads: int
    kv_heads: int
    head_dim: int
    window: int
    block_size: int
    layers: int = 2
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass
class Request:
    """All tokens that it will ever have, and how far it is."""

    keys: Tensor
    """[layers, kv_heads, tokens, head_dim]; `values` likewise."""
    values: Tensor
    queries: Tensor
    """[layers, query_heads, tokens, head_dim]"""
    protected: int = 0
    """Leading blocks that never go."""
    key: int = 7
    slot: int = 0
    table: list[int] = field(default_factory=list)
    num_tokens: int = 0
    survivors: int = 0
    """Candidates that stayed at the last eviction, in blocks."""
    events: int = 0
    held: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0, dtype=torch.int64))
    """[layers, kv_heads, live tokens]: the positions of the tokens that should still be there."""

    @staticmethod
    def random(model: Model, tokens: int, *, seed: int = 0, **kwargs: Any) -> Request:
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> Tensor:
            size = (model.layers, heads, tokens, model.head_dim)
            return torch.randn(size, generator=generator).to(model.dtype)

        keys, values = draw(model.kv_heads), draw(model.kv_heads)
        return Request(keys, values, draw(model.query_heads), **kwargs)

    @property
    def live(self) -> list[int]:
        """Its live blocks in order, logically."""
        return [place for place, block in enumerate(self.table) if block]

    def row(self, group: int) -> Tensor:
        """Its block table, as a runner gives it."""
        return torch.tensor(self.table)

    @property
    def live_ids(self) -> Tensor:
        return torch.tensor([self.table[place] for place in self.live])


class Watched:
    """A policy, and what it saw and returned last."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.needs = policy.needs
        self.combine = policy.combine
        self.combine_ranks = policy.combine_ranks

    def global_score(self) -> None:
        """It is watched while it scores, one request at a time."""

    def update(self, view: View) -> Tensor:
        assert view.history is not None
        self.past = view.history.clone()
        return self.policy.update(view)

    def score(self, view: View) -> Tensor:
        self.view = view
        self.scores = self.policy.score(view)
        return self.scores


class Cache:
    """The paged caches of all layers: `poison` wherever none of a request's live tokens is."""

    def __init__(
        self,
        model: Model,
        policy: Policy,
        ops: PagedOps,
        *,
        moves_tokens: bool,
        scope: str = "head",
        num_blocks: int = 64,
        id_seed: int = 0,
        poison: float = NAN,
    ) -> None:
        self.model, self.poison, self.scope = model, poison, scope
        self.watched = Watched(policy)
        self.moves_tokens = moves_tokens
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(id_seed))
        self.free = (order + 1).tolist()
        size = (num_blocks, model.kv_heads, model.block_size)
        needs = policy.needs
        has_planes = needs.attention_mass or (needs.history and moves_tokens)
        self.ring_index = RingIndex(model.window, MAX_TOKENS, CPU) if needs.queries else None
        self.rings = None
        if needs.queries:
            self.rings = QueryRings(
                model.window,
                layers=model.layers,
                slots=SLOTS,
                query_heads=model.query_heads,
                head_dim=model.head_dim,
                dtype=model.dtype,
                device=CPU,
            )
        planes = torch.full((model.layers, *size), poison) if has_planes else None
        self.mass = MassIndex() if needs.attention_mass else None
        self.layers = [
            EvictedLayer(
                ops=ops,
                kv_group=0,
                layer_group=0,
                kv_cache=torch.full((*size, 2 * model.head_dim), poison, dtype=model.dtype),
                plane=planes[i] if planes is not None else None,
                ring=self.rings.of_layer(i) if self.rings is not None else None,
                ring_index=self.ring_index,
                mass=self.mass,
                kv_heads=model.kv_heads,
                head_dim=model.head_dim,
                scale=model.scale,
                softcap=model.softcap,
            )
            for i in range(model.layers)
        ]
        self.scorer = Scorer(
            self.watched,  # type: ignore[arg-type]
            self.layers,
            ops,
            window=model.window,
            block_size=model.block_size,
            moves_tokens=moves_tokens,
            scope=scope,
            slots=SLOTS,
            max_blocks=num_blocks,
            rings=self.rings,
            ring_index=self.ring_index,
        )

    # ---- a step of the engine

    def step(self, *batch: tuple[Request, int]) -> None:
        """Each request computes so many tokens more: one forward."""
        for request, count in batch:
            self._write(request, count)
        starts = torch.tensor([0, *(count for _, count in batch)]).cumsum(0).tolist()
        if self.ring_index is not None:
            self.ring_index.clear()
            self.ring_index.fill(
                [
                    (Recording(request.slot, request.num_tokens), start, start + count)
                    for (request, count), start in zip(batch, starts, strict=False)
                ]
            )
        if self.mass is not None:
            self._accumulate([request for request, _ in batch], starts)
        for i, layer in enumerate(self.layers):
            queries = torch.cat(
                [r.queries[i, :, r.num_tokens - n : r.num_tokens] for r, n in batch], 1
            )
            layer.before_attention(queries.transpose(0, 1).contiguous())
            layer.after_attention(queries.transpose(0, 1).contiguous())

    def _write(self, request: Request, count: int) -> None:
        block_size, first = self.model.block_size, request.num_tokens
        request.num_tokens += count
        while len(request.table) * block_size < request.num_tokens:
            request.table.append(self.free.pop())
        position = first
        while position < request.num_tokens:
            block, slot = request.table[position // block_size], position % block_size
            end = min(position - slot + block_size, request.num_tokens)
            slots, new = slice(slot, slot + end - position), slice(position, end)
            for layer, keys, values in zip(self.layers, request.keys, request.values, strict=True):
                LAYOUT.keys(layer.kv_cache)[block, :, slots] = keys[:, new]
                LAYOUT.values(layer.kv_cache)[block, :, slots] = values[:, new]
            position = end
        added = torch.arange(first, request.num_tokens)
        added = added.expand(len(self.layers), self.model.kv_heads, -1)
        request.held = torch.cat([request.held, added], -1) if request.held.numel() else added

    def _accumulate(self, requests: Sequence[Request], starts: list[int]) -> None:
        assert self.mass is not None
        table = torch.zeros(len(requests), max(len(r.live) for r in requests), dtype=torch.int32)
        for row, request in enumerate(requests):
            table[row, : len(request.live)] = request.live_ids
        self.mass.fill(
            0,
            table,
            torch.tensor([r.held.shape[-1] for r in requests], dtype=torch.int32),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([r.protected * self.model.block_size for r in requests]).int(),
        )

    # ---- an eviction

    def selection(self, request: Request, keep: int) -> Selection:
        end = (request.num_tokens - self.model.window) // self.model.block_size
        return Selection(
            slot=request.slot,
            num_tokens=request.num_tokens,
            protected=request.protected,
            candidates=([b for b in request.live if request.protected <= b < end],),
            keep=keep,
            remembered=request.survivors,
            event=request.events,
            key=request.key,
        )

    def observe(self, request: Request, keep: int) -> View:
        """Score the request and leave it as it is. Returns what the policy saw."""
        self.scorer.block_scores([(self.selection(request, keep), request.row)])
        return self.watched.view

    def evict(self, request: Request, keep: int) -> Tensor:
        """`keep` blocks worth of candidates stay. Returns scores [layers, kv_heads, units]."""
        seen = self.selection(request, keep)
        candidates = seen.candidates[0]
        if self.moves_tokens:
            stay = candidates[:keep]
            self.scorer.compact([(Compaction(seen, stay), request.row)])
            kept = self.best(keep * self.model.block_size)
        else:
            ((scores,),) = self.scorer.block_scores([(seen, request.row)])
            units = torch.tensor(_best(scores.tolist(), keep), dtype=torch.int64)
            stay = [candidates[unit] for unit in units.tolist()]
            slots = torch.arange(self.model.block_size)
            kept = (units[:, None] * self.model.block_size + slots).flatten()
            kept = kept.expand(len(self.layers), self.model.kv_heads, -1)
        first = request.protected * self.model.block_size
        end = first + len(candidates) * self.model.block_size
        held = request.held
        request.held = torch.cat(
            [held[..., :first], held[..., first:end].gather(-1, kept), held[..., end:]], -1
        )
        for place in set(candidates) - set(stay):
            self._release(request, place)
        request.survivors, request.events = keep, request.events + 1
        return self.watched.scores

    def best(self, count: int) -> Tensor:
        """The units that scored best under the scope, in order: [layers, kv_heads, count]."""
        scores = self.watched.scores
        if self.scope == "layer":
            scores = self.watched.combine(scores)[:, None].expand_as(scores)
        elif self.scope == "all":
            scores = self.watched.combine(scores.flatten(0, 1)).expand_as(scores)
        return torch.tensor([[_best(row, count) for row in layer] for layer in scores.tolist()])

    def _release(self, request: Request, place: int) -> None:
        block = request.table[place]
        request.table[place] = 0
        self.free.append(block)
        for layer in self.layers:
            layer.kv_cache[block] = self.poison
            if layer.plane is not None:
                layer.plane[block] = self.poison

    # ---- what is there

    def snapshot(self) -> list[Tensor]:
        """Copies of everything that scoring must leave alone."""
        mine = [layer.kv_cache for layer in self.layers]
        if self.mass is not None:
            mine += [layer.plane for layer in self.layers if layer.plane is not None]
        return [tensor.clone() for tensor in mine]

    def check(self, request: Request) -> None:
        """Each layer and head holds the tokens that it should, in order, bit for bit."""
        live = request.held.shape[-1]
        for i, layer in enumerate(self.layers):
            at = request.held[i][..., None].expand(-1, -1, self.model.head_dim)
            keys, values = LAYOUT.read(layer.kv_cache, request.live_ids)
            assert torch.equal(keys[:, :live], request.keys[i].gather(1, at))
            assert torch.equal(values[:, :live], request.values[i].gather(1, at))


def _best(scores: list[float], count: int) -> list[int]:
    """The places of the best, in order; of equals the newer ones."""
    ascending = sorted(range(len(scores)), key=lambda place: (scores[place], place))
    return sorted(ascending[len(scores) - count :])
