# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Each operator as a call on a batch, with its oracle and the bytes that it cannot avoid.

Import it after `common.use`: Triton's decorators read then whether they interpret."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gkv_vllm.triton_kernels import key_norms, redundancy, score, topk
from gkv_vllm.triton_kernels.paged import PagedLayers, pointers
from gkv_vllm.triton_kernels.requests import DueRequests
from gpu.common import Model
from gpu.pool import DTYPE, Batch, Pool
from torch import Tensor

from gkv_vllm.ops import topk as oracle_topk
from gkv_vllm.ops.layers import LayerOps
from gkv_vllm.ops.layout import GPULayout
from gkv_vllm.ops.paged import PagedOps, ReferenceOps
from gkv_vllm.ops.triton import TritonLayerOps, TritonOps
from gkv_vllm.policies.gkv import GKV

SCORED_TOGETHER = 32768
"""Live tokens that a worker scores at once (`worker.SCORED_TOGETHER`, whose module needs vLLM)."""
THRESHOLD = 0.5
POLICY = GKV()
FLOAT, KEY, PLACE, ID = 4, 2, 8, 4
"""Bytes of a score, of an element of the cache, of a place among tokens, of a block id."""


@dataclass(frozen=True)
class Written:
    """What an operator writes, where it returns nothing."""

    tensors: Sequence[Tensor]
    blocks: Tensor | None = None
    """int64 ids: only these blocks of each tensor, which as a whole fill the device's memory."""

    def after(self, call: Callable[[], Any]) -> list[Tensor]:
        """What a call leaves behind, which is then undone."""
        before = self._read()
        call()
        found = self._read()
        for x, content in zip(self.tensors, before, strict=True):
            if self.blocks is None:
                x.copy_(content)
            else:
                x[self.blocks] = content
        return found

    def _read(self) -> list[Tensor]:
        return [x.clone() if self.blocks is None else x[self.blocks] for x in self.tensors]


@dataclass(frozen=True)
class Case:
    """One operator by one implementation, on all requests of a batch."""

    operator: str
    impl: str
    run: Callable[[], Any]
    traffic: int
    """Bytes that have to be read and written at least, by whatever computes this."""
    oracle: Callable[[], Any] | None = None
    """The first request alone, in torch on the same device."""
    written: Written | None = None
    """Where to find the numbers of both; None: they return them, the first request's first."""


def implementations() -> dict[str, PagedOps]:
    """Those that this machine runs: Triton, and CUDA C++ where it was built."""
    found: dict[str, PagedOps] = {"triton": TritonOps(GPULayout())}
    if torch.cuda.is_available():
        try:
            from gkv_vllm.ops.cuda import CUDAOps
        except ImportError as error:
            print(f"CUDA operators are not measured, since they are not there: {error}")
        else:
            found["cuda"] = CUDAOps()
    return found


class Scoring:
    """What the kernels and the oracle take of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        pool, model, size = batch.pool, batch.model, batch.model.block_size
        self.oracle = ReferenceOps(GPULayout()).bind(pool.caches)
        triton = TritonOps(GPULayout()).bind(pool.caches)
        assert isinstance(triton, TritonLayerOps)
        self.layers: PagedLayers = triton.layers
        assert pool.caches.planes is not None
        self.planes = pointers(pool.caches.planes)
        self.due = self._due(batch.keep_blocks * size)
        self.due_by_block = self._due(batch.keep_blocks)
        self.heads = model.layers * model.kv_heads * batch.requests
        self.tokens = batch.candidate_blocks * size
        self.unprotected = batch.live_tokens - model.protected

    def _due(self, remembered: int) -> DueRequests:
        batch, model = self.batch, self.batch.model
        tokens = batch.candidate_blocks * model.block_size
        return DueRequests.of(
            batch.tables,
            batch.table_of_layer,
            live_tokens=[batch.live_tokens] * batch.requests,
            protected=[model.protected] * batch.requests,
            num_candidates=[tokens] * batch.requests,
            remembered=[remembered] * batch.requests,
            window=model.window,
            block_size=model.block_size,
        )

    def keys(self, tokens: int) -> int:
        """Bytes of so many keys of every request, layer and head."""
        return self.heads * tokens * self.batch.model.head_dim * KEY

    def floats(self, tokens: int) -> int:
        return self.heads * tokens * FLOAT

    def past(self) -> Tensor:
        """No past: what a kernel finds once it has run itself, the maximum does not change."""
        model = self.batch.model
        return torch.zeros(model.layers, model.kv_heads, self.tokens, device=self.batch.pool.device)

    def cases(self) -> Iterator[Case]:
        batch, due, layers = self.batch, self.due, self.layers
        model, numbers = batch.model, {"scale": batch.scale, "alpha": POLICY.alpha}
        window = self.heads * model.query_heads // model.kv_heads * model.window * model.head_dim
        queries = window * KEY
        view = batch.view(0, self.oracle, history=self.past())
        # What other requests left in the planes is no past of these.
        for plane in batch.pool.caches.planes or ():
            plane.zero_()
        yield Case(
            "score_tokens",
            "triton",
            lambda: score.score_tokens(batch.queries, layers, due, self.planes, **numbers),
            self.keys(batch.live_tokens) + queries + 3 * self.floats(self.tokens),
            lambda: POLICY.update(view),
        )
        yield self._score_blocks(numbers, self.keys(batch.live_tokens) + queries)
        yield self._redundancy("redundancy, keys alike")
        yield self._superseded()
        yield self._mix()
        yield self._key_norms()
        yield self._topk()

    def _score_blocks(self, numbers: dict[str, float], read: int) -> Case:
        batch, blocks = self.batch, self.batch.candidate_blocks
        device, model = batch.pool.device, batch.model
        size = (batch.requests, model.layers, model.kv_heads, blocks)
        history = torch.zeros(size, device=device)
        slots = torch.arange(batch.requests, dtype=torch.int32, device=device)
        logical = torch.arange(blocks, dtype=torch.int32, device=device)
        logical = logical.expand(1, batch.requests, -1).contiguous()
        view = replace(
            batch.view(0, self.oracle, history=torch.zeros(size[1:], device=device)),
            unit=model.block_size,
        )
        return Case(
            "score_blocks",
            "triton",
            lambda: score.score_blocks(
                batch.queries, self.layers, self.due_by_block, history, slots, logical, **numbers
            ),
            read + 3 * self.floats(blocks),
            lambda: POLICY.update(view),
        )

    def _redundancy(self, name: str) -> Case:
        batch, first = self.batch, self.batch.model.protected
        return Case(
            name,
            "triton",
            lambda: redundancy.redundancy(self.layers, self.due, threshold=THRESHOLD),
            self.keys(self.unprotected) + self.floats(self.unprotected),
            lambda: self.oracle.redundancy(
                batch.block_ids(0), first, batch.live_tokens, THRESHOLD, False
            ),
        )

    def _superseded(self) -> Case:
        batch, first = self.batch, self.batch.model.protected
        return Case(
            "superseded",
            "triton",
            lambda: redundancy.superseded(self.layers, self.due),
            self.keys(self.unprotected) + self.floats(self.unprotected),
            lambda: self.oracle.superseded(batch.block_ids(0), first, batch.live_tokens),
        )

    def _mix(self) -> Case:
        batch, model = self.batch, self.batch.model
        formula = POLICY.global_score()
        assert formula is not None
        shape = (batch.requests, model.layers, model.kv_heads)
        importance = torch.rand(*shape, self.tokens, device=batch.pool.device)
        similarity = torch.rand(*shape, self.unprotected, device=batch.pool.device)

        def oracle() -> Tensor:
            shares = (similarity[0] / formula.temperature).softmax(-1)
            older = shares[..., : self.unprotected - model.window]
            redundant = (older / older.amax(-1, keepdim=True))[..., : self.tokens]
            weight = formula.score_weight
            return weight * importance[0] - (1 - weight) * redundant

        return Case(
            "mix_scores",
            "triton",
            lambda: redundancy.mix_scores(
                importance.unbind(),
                similarity.unbind(),
                self.due,
                score_weight=formula.score_weight,
                temperature=formula.temperature,
                unit=1,
            ),
            2 * self.floats(self.tokens) + self.floats(self.unprotected),
            oracle,
        )

    def _key_norms(self) -> Case:
        batch, live = self.batch, self.batch.live_tokens
        ids = [batch.block_ids(i) for i in range(batch.requests)]
        return Case(
            "key_norms",
            "triton",
            lambda: [key_norms.key_norms(self.layers, of_request, live) for of_request in ids],
            self.keys(live) + self.floats(live),
            lambda: self.oracle.key_norms(ids[0], live),
        )

    def _topk(self) -> Case:
        batch, model = self.batch, self.batch.model
        keep = batch.keep_blocks * model.block_size
        size = (batch.requests, model.layers, model.kv_heads, self.tokens)
        scores = torch.rand(size, device=batch.pool.device)
        return Case(
            "topk_keep",
            "triton",
            lambda: [topk.topk_keep(of_request, keep) for of_request in scores],
            self.floats(self.tokens) + self.heads * keep * PLACE,
            lambda: oracle_topk.topk_keep(scores[0], keep),
        )


def alike(scoring: Scoring) -> Case:
    """The worst case of redundancy: no two keys resemble each other. Fill the pool first."""
    return scoring._redundancy("redundancy, none alike")


def moving(batch: Batch, impls: dict[str, PagedOps]) -> Iterator[Case]:
    """Compaction, per request in all layers, with random survivors of each layer and head."""
    model, size = batch.model, batch.model.block_size
    shape = (model.layers, model.kv_heads, batch.candidate_blocks * size)
    scores = torch.rand(shape, device=batch.pool.device)
    keep = oracle_topk.topk_keep(scores, batch.keep_blocks * size)
    stays = torch.arange(keep.shape[-1], device=keep.device)
    moved = int((keep != stays).sum()) * batch.requests
    traffic = 2 * moved * (2 * model.head_dim * KEY + FLOAT) + batch.requests * keep.numel() * PLACE
    caches = batch.pool.caches
    assert caches.planes is not None
    oracle = ReferenceOps(GPULayout()).bind(caches)

    def compact(ops: LayerOps) -> None:
        for request in range(batch.requests):
            batch.move(ops, request, keep)

    for impl, ops in impls.items():
        yield Case(
            "compact",
            impl,
            partial(compact, ops.bind(caches)),
            traffic,
            partial(batch.move, oracle, 0, keep),
            Written((*caches.kv_caches, *caches.planes), batch.block_ids(0)[0]),
        )


def events(batch: Batch, impls: dict[str, PagedOps]) -> Iterator[Case]:
    """All that happens when the batch is due, as the worker does it, with its small uploads."""
    for impl, ops in impls.items():
        bound = ops.bind(batch.pool.caches)
        scoring = Scoring(batch)
        traffic = scoring.keys(batch.live_tokens)
        moved = next(moving(batch, {impl: ops})).traffic
        yield Case("event", impl, partial(event, batch, bound), traffic + moved)


def event(batch: Batch, ops: LayerOps, requests: range | None = None) -> None:
    """Score, select and compact these requests (or all) in every layer."""
    formula = POLICY.global_score()
    assert formula is not None
    due = list(requests if requests is not None else range(batch.requests))
    together = max(1, SCORED_TOGETHER // batch.live_tokens)
    for start in range(0, len(due), together):
        chunk = due[start : start + together]
        views = [batch.view(i, ops) for i in chunk]
        for i, view, scores in zip(
            chunk, views, ops.global_scores(formula, views, None), strict=True
        ):
            batch.move(ops, i, ops.topk_keep(scores, view.keep))


def stepping(pool: Pool, rows: int, live_tokens: int, impls: dict[str, PagedOps]) -> Iterator[Case]:
    """What every step does: live tables with every other block gone, and queries of all layers."""
    model, device = pool.model, pool.device
    blocks = live_tokens // model.block_size
    table = torch.zeros(rows, 2 * blocks, dtype=torch.int32, device=device)
    table[:, 1::2] = torch.randint(
        1, pool.num_blocks, (rows, blocks), generator=pool.draw, device=device
    )
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    lens = torch.full((rows,), 2 * live_tokens, **ints)
    starts, slots = torch.arange(rows + 1, **ints), torch.arange(rows, **ints)
    live, live_lens = torch.zeros_like(table), torch.zeros_like(lens)
    places = torch.zeros(rows, **ints)
    step = (table, lens, starts, slots, model.block_size, model.window, live, live_lens, places)

    heads = (model.query_heads, model.head_dim)
    queries = torch.randn(rows, *heads, device=device).to(DTYPE)
    ring = torch.zeros(model.layers, rows * model.window, *heads, dtype=DTYPE, device=device)
    own = torch.arange(rows, **ints) * model.window
    oracle = ReferenceOps(GPULayout())

    def store(ops: PagedOps) -> None:
        for of_layer in ring:
            ops.store_window_queries(queries, own, of_layer)

    plane = torch.zeros(pool.num_blocks, model.kv_heads, model.block_size, device=device)
    nothing_protected = torch.zeros(rows, **ints)

    def accumulate(ops: PagedOps) -> None:
        batch = (live, live_lens, starts, nothing_protected)
        for cache in pool.caches.kv_caches:
            ops.attention_mass(queries, cache, plane, *batch, model.head_dim**-0.5, 0.0)

    keys = model.layers * model.kv_heads * rows * live_tokens
    for impl, ops in impls.items():
        yield Case(
            "prepare_step",
            impl,
            partial(ops.prepare_step, *step),
            rows * (4 * blocks + 4) * ID,
            partial(oracle.prepare_step, *step),
            Written((live, live_lens, places)),
        )
        yield Case(
            "store_window_queries",
            impl,
            partial(store, ops),
            2 * model.layers * queries.numel() * KEY,
            partial(store, oracle),
            Written((ring,)),
        )
    # After `prepare_step`, whose live tables it reads; csrc/cuda has none of its own.
    yield Case(
        "attention_mass",
        "triton",
        partial(accumulate, impls["triton"]),
        keys * (model.head_dim * KEY + 2 * FLOAT),
        partial(accumulate, oracle),
        Written((plane,)),
    )


def all_cases(batch: Batch, impls: dict[str, PagedOps]) -> Iterator[Case]:
    """Every operator on a batch, whole events last."""
    yield from stepping(batch.pool, batch.requests, batch.live_tokens, impls)
    yield from Scoring(batch).cases()
    yield from moving(batch, impls)
    yield from events(batch, impls)


def largest_difference(case: Case) -> float:
    """Between the first request's numbers and the oracle's, from the same start."""
    assert case.oracle is not None
    if case.written is None:
        found, expected = [case.run()[0]], [case.oracle()]
    else:
        found, expected = case.written.after(case.run), case.written.after(case.oracle)
    return max(
        float((ours.float() - theirs.float()).abs().max())
        for ours, theirs in zip(found, expected, strict=True)
    )


def shape_of(model: Model) -> dict[str, int]:
    """For the JSON: what was measured."""
    return {name: int(value) for name, value in vars(model).items()}
