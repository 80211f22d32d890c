# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""A captured graph keeps the addresses of its first batch: what it reads there in a later step is
what an eager step would be given."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from gkv_vllm.engine.plan import Recording
from gkv_vllm.ops.live_table import squeeze
from gkv_vllm.ops.paged import PagedOps, ReferenceOps
from gkv_vllm.ops.triton import TritonOps
from gkv_vllm.worker.device_batch import DeviceBatch
from gkv_vllm.worker.rings import RingIndex

CPU = torch.device("cpu")
BLOCK_SIZE, WINDOW, WIDTH, MAX_ROWS, MAX_TOKENS = 16, 4, 9, 6, 40
implementations = pytest.mark.parametrize(
    "ops", [ReferenceOps(), TritonOps()], ids=["reference", "triton"]
)


def batch(rows: list[tuple[int, int]], holes: list[list[int]], padded: int) -> Any:
    """rows: (tokens, queries); row r has its null blocks at holes[r]; padded to so many rows."""
    lens, queries = [tokens for tokens, _ in rows], [count for _, count in rows]
    table = torch.full((padded, WIDTH), 77, dtype=torch.int32)
    for r, (tokens, _) in enumerate(rows):
        used = -(-tokens // BLOCK_SIZE)
        table[r, :used] = torch.arange(1 + 10 * r, 1 + 10 * r + used)
        table[r, holes[r]] = 0
    padding = padded - len(rows)
    starts = torch.tensor([0, *queries, *[0] * padding]).cumsum(0).int()
    seq_lens = torch.tensor([*lens, *[0] * padding], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        num_reqs=padded,
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        max_seq_len=max(lens),
        block_table_tensor=table,
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
    )


class Engine:
    """The evictor's part: which rows have slots and holes."""

    def __init__(self) -> None:
        self.rows: list[int] | None = None
        self.lost: np.ndarray | None = None

    def slots(self, metadata: Any, rows: int) -> list[int] | None:
        return self.rows + [-1] * (rows - len(self.rows)) if self.rows else None

    def holes(self, metadata: Any) -> np.ndarray | None:
        return self.lost


def device_batch(ops: PagedOps, engine: Engine) -> tuple[DeviceBatch, RingIndex]:
    index = RingIndex(WINDOW, MAX_TOKENS, CPU)
    made = DeviceBatch(
        engine,  # type: ignore[arg-type]
        ops,
        block_size=BLOCK_SIZE,
        max_rows=MAX_ROWS,
        group=0,
        ring_index=index,
        mass_index=None,
        device=CPU,
    )
    return made, index


ROWS, HOLES = [(97, 1), (130, 1), (40, 23), (16, 1)], [[2, 3], [0], [], []]


@implementations
def test_a_later_step_lies_where_the_captured_one_lay(ops: PagedOps) -> None:
    engine = Engine()
    prepare, index = device_batch(ops, engine)
    captured = prepare(batch([(1, 1)] * MAX_ROWS, [[]] * MAX_ROWS, MAX_ROWS))
    assert (index.places == -1).all()
    engine.rows, engine.lost = [2, -1, 0, 1], np.array([2, 1, 0, 0])
    step = batch(ROWS, HOLES, MAX_ROWS)
    live = prepare(step)
    eager = squeeze(step.block_table_tensor, step.seq_lens, BLOCK_SIZE)
    assert torch.equal(captured.seq_lens, eager.seq_lens)
    for row, tokens in enumerate(eager.seq_lens.tolist()):
        blocks = -(-tokens // BLOCK_SIZE)
        table = captured.block_table_tensor[row, :blocks]
        assert torch.equal(table, eager.block_table[row, :blocks])
    assert live.block_table_tensor.data_ptr() == captured.block_table_tensor.data_ptr()
    assert live.seq_lens.data_ptr() == captured.seq_lens.data_ptr()
    on_host = RingIndex(WINDOW, MAX_TOKENS, CPU)
    starts = step.query_start_loc.tolist()
    on_host.fill(
        [
            (Recording(slot, ROWS[row][0]), starts[row], starts[row + 1])
            for row, slot in enumerate(engine.rows)
            if slot >= 0
        ]
    )
    assert torch.equal(index.places, on_host.places)


@implementations
def test_a_small_batch_may_come_first(ops: PagedOps) -> None:
    """As where a batch measures memory before anything is captured."""
    engine = Engine()
    prepare, _ = device_batch(ops, engine)
    first = prepare(batch([(1, 1)], [[]], 1))
    engine.lost = np.array([2, 1, 0, 0])
    later = prepare(batch(ROWS, HOLES, MAX_ROWS))
    assert later.seq_lens.tolist() == [65, 114, 40, 16, 0, 0]
    assert later.block_table_tensor.data_ptr() == first.block_table_tensor.data_ptr()


@implementations
def test_nothing_that_is_derived_of_lengths_stays(ops: PagedOps) -> None:
    """vLLM remembers what it derived from a batch; a runner may not know a bound on the host."""
    engine = Engine()
    prepare, _ = device_batch(ops, engine)
    engine.lost = np.array([2, 1, 0, 0])
    step = replace(batch(ROWS, HOLES, len(ROWS)), seq_lens_cpu_upper_bound=None)
    assert step.compute_num_computed_tokens().tolist() == [96, 129, 17, 15]
    live = prepare(step)
    assert live.compute_num_computed_tokens().tolist() == [64, 113, 17, 15]
    assert live.max_seq_len == step.max_seq_len


@implementations
def test_the_host_knows_live_lengths_without_asking_the_device(ops: PagedOps) -> None:
    engine = Engine()
    prepare, _ = device_batch(ops, engine)
    engine.lost = np.array([2, 1, 0, 0])
    live = prepare(batch(ROWS, HOLES, len(ROWS)))
    assert live.seq_lens_cpu_upper_bound.tolist() == live.seq_lens.tolist() == [65, 114, 40, 16]
    assert live.max_seq_len == 114


@implementations
def test_a_dummy_batch_after_a_step_has_no_places_and_keeps_its_bound(ops: PagedOps) -> None:
    engine = Engine()
    prepare, index = device_batch(ops, engine)
    engine.rows, engine.lost = [0, 1, 2, 3], np.array([2, 1, 0, 0])
    prepare(batch(ROWS, HOLES, len(ROWS)))
    assert (index.places >= 0).any()
    engine.rows, engine.lost = None, None
    dummy = prepare(batch([(500 // BLOCK_SIZE, 1)] * 3, [[]] * 3, 3))
    assert (index.places == -1).all()
    assert dummy.max_seq_len == 500 // BLOCK_SIZE


@implementations
def test_a_group_without_rings_leaves_the_places_alone(ops: PagedOps) -> None:
    engine = SimpleNamespace(slots=None, holes=lambda metadata: None)
    second = DeviceBatch(
        engine,  # type: ignore[arg-type]
        ops,
        block_size=BLOCK_SIZE,
        max_rows=MAX_ROWS,
        group=1,
        ring_index=None,
        mass_index=None,
        device=CPU,
    )
    live = second(batch(ROWS, HOLES, MAX_ROWS))
    assert live.seq_lens.tolist() == [65, 114, 40, 16, 0, 0]
