# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""One prompt in a paged cache that loses tokens once, by the worker's own scorer; no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gkv_vllm.engine.footprint import blocks_for
from gkv_vllm.engine.plan import Compaction, Recording, Selection
from gkv_vllm.ops import paged
from gkv_vllm.ops.layout import CPULayout
from gkv_vllm.policies.base import Policy
from gkv_vllm.worker.layers import EvictedLayer
from gkv_vllm.worker.rings import QueryRings, RingIndex
from gkv_vllm.worker.scorer import Scorer

BLOCK_SIZE = 32
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Eviction:
    """How much of a prompt goes, as the planner says it with protect=none."""

    tokens: int
    window: int
    budget: int

    @property
    def candidates(self) -> int:
        """Tokens that compete: whole blocks that end before the window."""
        return (self.tokens - self.window) // BLOCK_SIZE * BLOCK_SIZE

    @property
    def keep(self) -> int:
        """Blocks of candidates that stay: the budget in blocks, less those of the newest tokens."""
        newest = blocks_for(self.tokens, BLOCK_SIZE) - self.candidates // BLOCK_SIZE
        return blocks_for(self.budget, BLOCK_SIZE) - newest

    @property
    def kept(self) -> int:
        """Tokens that stay."""
        return self.keep * BLOCK_SIZE + self.tokens - self.candidates


class KeepWatch:
    """A scorer's policy and operators, noting what scored how and what was kept.

    The policy is never fused: operators that compute a formula at once are not checked here."""

    def __init__(self, scorer: Scorer) -> None:
        self.scores: list[Tensor] = []
        """Per event [layers, kv_heads, candidates]."""
        self.kept: list[Tensor] = []
        """Per event the places among the candidates, [layers, kv_heads, keep]."""
        score, ops = scorer._score, scorer.ops
        watch = self

        def noted_score(due: Any) -> Any:
            scored = score(due)
            watch.scores += [scores.clone() for scores, _ in scored]
            return scored

        class NotedOps:
            def __getattr__(self, name: str) -> Any:
                return getattr(ops, name)

            def compact(self, source: Any, target: Any, places: Any, keep: Tensor) -> None:
                watch.kept.append(keep.clone())
                ops.compact(source, target, places, keep)

        scorer._score = noted_score  # type: ignore[method-assign]
        scorer.ops = NotedOps()  # type: ignore[assignment]


def positions(kept: Tensor, eviction: Eviction) -> Tensor:
    """Candidates that stayed and the newest tokens, which always do: [layers, kv_heads, tokens]."""
    newest = torch.arange(eviction.candidates, eviction.tokens)
    return torch.cat([kept, newest.expand(*kept.shape[:2], -1)], -1)


def evict(
    policy: Policy, prompt: dict[str, Tensor], eviction: Eviction, impl: str
) -> tuple[Tensor, Tensor]:
    """Positions that stayed [layers, kv_heads, tokens], and scores [layers, kv_heads, candidates].

    `prompt` has keys, values and queries, each [layers, heads, tokens, head_dim]. Blocks lie
    scattered in the cache, NaN is wherever no token is, and what stayed is read back."""
    keys, values = prompt["keys"], prompt["values"]
    layers, kv_heads, tokens, head_dim = keys.shape
    blocks = blocks_for(tokens, BLOCK_SIZE)
    table = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(0))[:blocks] + 1
    size = (2 * blocks + 1, kv_heads, BLOCK_SIZE, 2 * head_dim)
    caches = [torch.full(size, torch.nan, dtype=keys.dtype) for _ in range(layers)]
    for layer, cache in enumerate(caches):
        CPULayout().write(cache, table, keys[layer], values[layer])
    scorer = _scorer(policy, caches, prompt["queries"], eviction, impl)
    watch = KeepWatch(scorer)
    candidates = list(range(eviction.candidates // BLOCK_SIZE))
    seen = Selection(0, tokens, 0, (candidates,), eviction.keep, 0, 0, key=0)
    scorer.compact([(Compaction(seen, candidates[: eviction.keep]), lambda group: table)])
    kept = positions(watch.kept[0], eviction)
    live = torch.cat([table[: eviction.keep], table[len(candidates) :]])
    _check_moved(caches, live, keys, values, kept)
    return kept, watch.scores[0]


def _scorer(
    policy: Policy, caches: list[Tensor], queries: Tensor, eviction: Eviction, impl: str
) -> Scorer:
    ops = paged.resolve(impl)
    layers, query_heads, tokens, head_dim = queries.shape
    rings = index = None
    if policy.needs.queries:
        index = RingIndex(eviction.window, tokens, CPU)
        rings = QueryRings(
            eviction.window,
            layers=layers,
            slots=1,
            query_heads=query_heads,
            head_dim=head_dim,
            dtype=queries.dtype,
            device=CPU,
        )
        index.fill([(Recording(0, tokens), 0, tokens)])
    evicted = [
        EvictedLayer(
            ops=ops,
            kv_group=0,
            layer_group=0,
            kv_cache=cache,
            plane=None,
            ring=rings.of_layer(layer) if rings is not None else None,
            ring_index=index,
            mass=None,
            kv_heads=cache.shape[1],
            head_dim=head_dim,
            scale=head_dim**-0.5,
            softcap=0.0,
        )
        for layer, cache in enumerate(caches)
    ]
    for layer, of_layer in zip(evicted, queries, strict=True):
        layer.before_attention(of_layer.transpose(0, 1).contiguous())
    return Scorer(
        policy,
        evicted,
        ops,
        window=eviction.window,
        block_size=BLOCK_SIZE,
        moves_tokens=True,
        scope="head",
        slots=1,
        max_blocks=caches[0].shape[0],
        rings=rings,
        ring_index=index,
    )


def _check_moved(
    caches: list[Tensor], live: Tensor, keys: Tensor, values: Tensor, kept: Tensor
) -> None:
    """RuntimeError unless the live blocks hold the bytes of exactly these positions, in order."""
    count = kept.shape[-1]
    for layer, cache in enumerate(caches):
        at = kept[layer][..., None].expand(-1, -1, keys.shape[-1])
        there = CPULayout().read(cache, live)
        for held, before in zip(there, (keys[layer], values[layer]), strict=True):
            if not torch.equal(held[:, :count], before.gather(1, at)):
                raise RuntimeError(f"layer {layer} does not hold the tokens that were to stay")
