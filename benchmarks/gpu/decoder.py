# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""A decode loop with the matrices of a model, paged attention, and eviction as the worker does it.

The weights are random and there is no RoPE, so the tokens mean nothing; the work of a step is that
of the model. Import it after `common.use`, as `operators`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu import operators
from gpu.attention import Attention
from gpu.common import Model
from gpu.pool import DTYPE
from gpu.requests import Requests
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from gkv_vllm.ops.paged import PagedOps
from gkv_vllm.ops.upload import upload

STOCK, IDLE, EVICTING = "stock", "idle", "evicting"
MODES = (STOCK, IDLE, EVICTING)


class Weights:
    """The matrices of all layers; what they hold only has to keep the numbers finite."""

    def __init__(self, model: Model, device: str) -> None:
        self.draw = torch.Generator(device).manual_seed(1)
        heads = model.query_heads + 2 * model.kv_heads
        attention = model.query_heads * model.head_dim
        self.layers = [
            {
                "qkv": self._matrix(heads * model.head_dim, model.hidden),
                "out": self._matrix(model.hidden, attention),
                "gate_up": self._matrix(2 * model.intermediate, model.hidden),
                "down": self._matrix(model.hidden, model.intermediate),
            }
            for _ in range(model.layers)
        ]
        self.embedding = self._matrix(model.vocabulary, model.hidden)
        self.head = self._matrix(model.vocabulary, model.hidden)

    def _matrix(self, rows: int, columns: int) -> Tensor:
        made = torch.empty(rows, columns, dtype=DTYPE, device=self.draw.device)
        return made.normal_(0, columns**-0.5, generator=self.draw)


class Decoder:
    """Steps of a batch in one mode. The forward pass is a CUDA graph, on a GPU."""

    def __init__(
        self,
        weights: Weights,
        requests: Requests,
        attention: Attention,
        ops: PagedOps,
        mode: str,
    ) -> None:
        self.weights, self.requests, self.attention = weights, requests, attention
        self.pool, self.model, self.mode, self.ops = requests.pool, requests.model, mode, ops
        device, rows, window = self.pool.device, len(requests.all), self.model.window
        self.caches = self.pool.caches.kv_caches
        self.bound = ops.bind(self.pool.caches)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.starts = torch.arange(rows + 1, **ints)
        self.no_slots = torch.full((rows,), -1, **ints)
        self.live_table = torch.zeros_like(requests.table)
        self.live_lens = torch.zeros_like(requests.lens)
        self.places = torch.full((rows,), -1, **ints)
        heads = (self.model.query_heads, self.model.head_dim)
        self.rings = torch.zeros(
            self.model.layers, rows * window, *heads, dtype=DTYPE, device=device
        )
        self.tokens = torch.arange(rows, device=device) % self.model.vocabulary
        self.event_seconds: list[Callable[[], float]] = []
        self.events = 0
        self.graph = self._capture() if device.type == "cuda" else None

    @property
    def evicts(self) -> bool:
        return self.mode == EVICTING

    def step(self) -> None:
        """Evict what is due, then one token for each request."""
        due = self.requests.due()
        if due:
            self._timed(lambda: self._shrink(due), len(due))
        slots = self.requests.recorded() if self.evicts else None
        self.requests.grow()
        if self.mode != STOCK:
            self._prepare(slots)
        if self.graph is None:
            self._forward()
        else:
            self.graph.replay()

    # ---- eviction

    def _shrink(self, due: list[int]) -> None:
        if not self.evicts:
            self.requests.shorten(due)
            return
        batch = self.requests.batch(due, self._window_queries(due))
        operators.event(batch, self.bound)
        self.requests.lose(due, batch)

    def _window_queries(self, due: list[int]) -> Tensor:
        """[layers, due, query_heads, window, head_dim], oldest first."""
        window = self.model.window
        places = [
            i * window + position % window
            for i in due
            for position in range(self.requests.all[i].tokens - window, self.requests.all[i].tokens)
        ]
        read = self.rings.index_select(1, upload(places, self.pool.device))
        return read.unflatten(1, (len(due), window)).transpose(2, 3).contiguous()

    def _prepare(self, slots: list[int] | None) -> None:
        known = slots is not None and max(slots) >= 0
        ring_slots = upload(slots, self.pool.device, torch.int32) if known else self.no_slots
        self.ops.prepare_step(
            self.requests.table,
            self.requests.lens,
            self.starts,
            ring_slots,
            self.model.block_size,
            self.model.window,
            self.live_table,
            self.live_lens,
            self.places,
        )

    def _timed(self, work: Callable[[], None], events: int) -> None:
        """Device time of the eviction of a step, read when all is done."""
        self.events += events
        if self.pool.device.type != "cuda":
            work()
            return
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        self.event_seconds.append(lambda: start.elapsed_time(end) / 1000)

    # ---- the forward pass

    def _forward(self) -> None:
        model, size = self.model, self.model.block_size
        table, lens = self.requests.table, self.requests.lens
        position = (lens - 1).long()
        blocks = table.gather(1, (position // size)[:, None])[:, 0].long()
        at = position % size
        if self.mode != STOCK:
            table, lens = self.live_table, self.live_lens
        x = self.weights.embedding[self.tokens]
        queries_end = model.query_heads * model.head_dim
        for weights, cache, ring in zip(self.weights.layers, self.caches, self.rings, strict=True):
            qkv = linear(self._norm(x), weights["qkv"])
            heads = qkv.unflatten(1, (-1, model.head_dim))
            queries, keys, values = heads.split(
                [model.query_heads, model.kv_heads, model.kv_heads], 1
            )
            cache[blocks, :, at] = torch.cat([keys, values], -1)
            if self.mode != STOCK:
                self.ops.store_window_queries(queries, self.places, ring)
            attended = self.attention(queries, cache, table, lens)
            x = x + linear(attended.reshape(-1, queries_end), weights["out"])
            gate, up = linear(self._norm(x), weights["gate_up"]).chunk(2, -1)
            x = x + linear(silu(gate) * up, weights["down"])
        self.tokens.copy_(linear(self._norm(x), self.weights.head).argmax(-1))

    def _norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:])

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Warm up on another stream, as capturing asks for, then capture; nothing has run then.

        The tokens and the cache's newest entries change, which is what the first steps write."""
        if self.mode != STOCK:
            self._prepare(None)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward()
        self.tokens.copy_(torch.arange(len(self.tokens), device=self.pool.device))
        return graph

    def check(self) -> None:
        """The device's live lengths are those that the host counts, or the loop was another one.

        RuntimeError where they differ."""
        if self.mode == STOCK:
            return
        expected = [request.live_tokens for request in self.requests.all]
        found = self.live_lens.tolist()
        if found != expected:
            raise RuntimeError(f"live lengths are {found}, not {expected}")
