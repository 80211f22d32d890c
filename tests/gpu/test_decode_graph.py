# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""A decode step that was captured once as a CUDA graph does, replayed, what an eager step does.

Where there is no GPU, its launches are repeated in Triton's interpreter with the tensors and the
numbers of the capture, as a graph would."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gkv_vllm.triton_kernels import attention_mass
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from gkv_vllm.ops.paged import PagedOps
from gkv_vllm.ops.triton import TritonOps
from gkv_vllm.worker.device_batch import DeviceBatch
from gkv_vllm.worker.layers import EvictedLayer
from gkv_vllm.worker.mass import MassIndex
from gkv_vllm.worker.rings import RingIndex

from .graphs import captured
from .survivors import Batch, Row, Shape, Unified

pytestmark = [
    pytest.mark.gpu,
    # vLLM's kernel divides by the length of rows that pad the batch; nobody reads the result.
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def few_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds for each."""
    if device.type == "cpu":
        monkeypatch.setattr(attention_mass, "PROGRAMS", 1)


SHAPE = Shape(kv_heads=2, group=3, head_dim=64)
ROWS, SLOTS, WINDOW, NUM_BLOCKS, WIDTH = 6, 7, 4, 80, 18
STEPS: dict[str, tuple[list[Row], list[int]]] = {
    "full": ([(97, 1, 0.5), (130, 1, 0.4), (33, 1, 0), (256, 1, 0.9), (17, 1, 1), (64, 1, 0)], []),
    "padded": ([(260, 1, 0.3), (49, 1, 1.0), (96, 1, 0.6)], [3, -1, 5]),
    "one row": ([(271, 1, 0.8)], [6]),
    "other rows have slots": (
        [(31, 1, 1.0), (98, 1, 0.7), (131, 1, 0.2), (35, 1, 0), (256, 1, 0.5)],
        [-1, 0, 2, -1, 1],
    ),
    "nothing is recorded": ([(113, 1, 0.9), (80, 1, 0.0)], []),
}
"""Requests, and the ring slot of each (none: no request is recorded)."""


class Engine:
    """The evictor's part: which rows have slots, and how many holes. They accumulate attention."""

    def __init__(self, slots: list[int], holes: list[int]) -> None:
        self.slots_of_rows, self.holes_of_rows = slots, holes

    def slots(self, metadata: Any, rows: int) -> list[int] | None:
        of_rows = self.slots_of_rows
        return of_rows + [-1] * (rows - len(of_rows)) if of_rows else None

    def protected(self, metadata: Any, rows: int) -> list[int] | None:
        slots = self.slots(metadata, rows)
        return [-1 if slot < 0 else SHAPE.block_size * (slot % 2) for slot in slots or ()] or None

    def holes(self, metadata: Any) -> np.ndarray:
        return np.array(self.holes_of_rows, dtype=np.int32)


class DecodeStep:
    """One attention layer under the policy, and the buffers that a runner keeps for its batches."""

    def __init__(self, ops: PagedOps, device: torch.device, dtype: torch.dtype) -> None:
        ints = partial(torch.zeros, dtype=torch.int32, device=device)
        self.device, self.engine = device, Engine([], [])
        self.cache = torch.zeros(
            NUM_BLOCKS, SHAPE.block_size, SHAPE.kv_heads, 2 * SHAPE.head_dim, dtype=dtype
        )
        self.cache = self.cache.to(device).transpose(1, 2)
        self.queries = torch.zeros(ROWS, SHAPE.heads, SHAPE.head_dim, dtype=dtype, device=device)
        self.out = torch.zeros_like(self.queries)
        self.table, self.lens, self.starts = ints(ROWS, WIDTH), ints(ROWS), ints(ROWS + 1)
        self.index, mass = RingIndex(WINDOW, ROWS + 3, device), MassIndex()
        self.index.every_step = True  # as on a GPU
        self.batch = DeviceBatch(
            self.engine,  # type: ignore[arg-type]
            ops,
            block_size=SHAPE.block_size,
            max_rows=ROWS,
            group=0,
            ring_index=self.index,
            mass_index=mass,
            device=device,
        )
        self.attend = Unified(SHAPE, max_tokens=ROWS, segments=4)
        self.ring = torch.zeros(SLOTS * WINDOW, *self.queries.shape[1:], dtype=dtype, device=device)
        self.plane = torch.zeros(self.cache.shape[:3], device=device)
        self.layer = EvictedLayer(
            ops=ops,
            kv_group=0,
            layer_group=0,
            kv_cache=self.cache,
            plane=self.plane,
            ring=self.ring,
            ring_index=self.index,
            mass=mass,
            kv_heads=SHAPE.kv_heads,
            head_dim=SHAPE.head_dim,
            scale=SHAPE.scale,
            softcap=0.0,
        )

    def load(self, batch: Batch, slots: list[int]) -> CommonAttentionMetadata:
        """Put the next batch where the last one was, padded to the rows of the graph."""
        metadata = batch.padded(ROWS)
        table = metadata.block_table_tensor
        for kept, new in (
            (self.cache, batch.cache),
            (self.queries[: len(batch.queries)], batch.queries),
            (self.table[:, : table.shape[1]], table),
            (self.lens, metadata.seq_lens),
            (self.starts, metadata.query_start_loc),
        ):
            kept.copy_(new)
        self.engine.slots_of_rows, self.engine.holes_of_rows = slots, batch.holes
        return replace(
            metadata,
            block_table_tensor=self.table,
            seq_lens=self.lens,
            query_start_loc=self.starts,
        )

    def forward(self, live: CommonAttentionMetadata) -> None:
        """What vLLM captures: attention over the live table, and what sees its queries."""
        self.layer.before_attention(self.queries)
        self.attend(
            self.queries,
            self.cache,
            self.out,
            table=live.block_table_tensor,
            lens=live.seq_lens,
            starts=self.starts,
            max_queries=1,
            max_len=live.max_seq_len,
        )
        self.layer.after_attention(self.queries)

    def eager(self, batch: Batch, slots: list[int]) -> DecodeStep:
        """The same step without a graph, in buffers of its own that know of no earlier batch."""
        other = DecodeStep(self.layer.ops, self.device, batch.dtype)
        other.ring.copy_(self.ring)
        other.plane.copy_(self.plane)
        other.forward(other.batch(other.load(batch, slots)))
        return other

    def state(self) -> dict[str, Tensor]:
        """What a step leaves behind. A live table is undefined behind a row's used blocks."""
        assert self.batch.live_table is not None
        columns = torch.arange(WIDTH, device=self.device)
        used = -(-self.lens // SHAPE.block_size)[:, None]
        tokens = int(self.starts[-1])
        return {
            "live table": self.batch.live_table.masked_fill(columns >= used, -1),
            "live lengths": self.batch.live_lens,
            "places": self.index.places,
            "ring": self.ring,
            "accumulated attention": self.plane,
            "output": self.out[:tokens],
        }


def drawn(seed: int, rows: list[Row], dtype: torch.dtype) -> Batch:
    return Batch(SHAPE, rows, dtype, seed=seed, num_blocks=NUM_BLOCKS)


def warm_up(step: DecodeStep, dtype: torch.dtype) -> CommonAttentionMetadata:
    """A dummy batch of full rows without holes and slots, as vLLM captures with."""
    return step.batch(step.load(drawn(99, [(1, 1, 0.0)] * ROWS, dtype), []))


def assert_same(step: DecodeStep, eager: DecodeStep, batch: Batch, name: str) -> None:
    for (what, ours), theirs in zip(step.state().items(), eager.state().values(), strict=True):
        assert torch.equal(ours, theirs), f"{what} of the step '{name}'"
    torch.testing.assert_close(
        step.out[: len(batch.queries)].cpu().float(),
        batch.attended(),
        rtol=0,
        atol=SHAPE.tolerance(batch.dtype),
    )


def test_a_replayed_forward_sees_the_live_table_of_its_own_step(
    device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """As vLLM runs it: the table is made before the graph, from metadata of that step."""
    ops, dtype = TritonOps(), dtypes[0]
    step = DecodeStep(ops, device, dtype)
    live = warm_up(step, dtype)
    replay = captured(lambda: step.forward(live), device)
    assert not step.ring.any() and not step.plane.any(), "the capture has left a trace"
    for seed, (name, (rows, slots)) in enumerate(STEPS.items()):
        batch = drawn(seed, rows, dtype)
        eager = step.eager(batch, slots)
        step.batch(step.load(batch, slots))
        replay()
        assert_same(step, eager, batch, name)
    assert step.ring.any() and step.plane.any()


def test_a_replayed_step_makes_its_own_live_table(
    device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Nothing of a step, its live table included, needs the host."""
    ops, dtype = TritonOps(), dtypes[0]
    step = DecodeStep(ops, device, dtype)
    live = warm_up(step, dtype)
    slots_of_rows = torch.full((ROWS,), -1, dtype=torch.int32, device=device)
    protected = step.batch.protected

    def whole() -> None:
        ops.prepare_step(
            *(step.table, step.lens, step.starts, slots_of_rows, SHAPE.block_size, WINDOW),
            *(live.block_table_tensor, live.seq_lens, step.index.places),
        )
        step.forward(live)

    replay = captured(whole, device)
    for seed, (name, (rows, slots)) in enumerate(STEPS.items()):
        batch = drawn(100 + seed, rows, dtype)
        step.load(batch, slots)
        for kept, new in (
            (slots_of_rows, step.engine.slots(None, ROWS)),
            (protected, step.engine.protected(None, ROWS)),
        ):
            kept.copy_(torch.tensor(new or [-1] * ROWS, dtype=torch.int32))
        eager = step.eager(batch, slots)
        replay()
        assert_same(step, eager, batch, name)
    assert step.ring.any() and step.plane.any()
