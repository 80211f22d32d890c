# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Live tables and ring places of mixed batches, against the same arithmetic on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from gkv_vllm.triton_kernels import live_table as module
from gkv_vllm.triton_kernels.live_table import prepare_step, squeeze_live_table
from torch import Tensor

from gkv_vllm.engine.plan import Recording
from gkv_vllm.ops.live_table import squeeze
from gkv_vllm.worker.rings import RingIndex

STALE = -77
"""What lies in memory that must not be read, or must not be written."""


@dataclass
class Batch:
    """Rows: decoding requests, prefill chunks, and rows that pad the batch at its end."""

    block_table: Tensor
    seq_lens: Tensor
    query_starts: Tensor
    slots: Tensor
    block_size: int

    @classmethod
    def random(cls, seed: int, rows: int, width: int, block_size: int) -> Batch:
        rng = np.random.default_rng(seed)
        padding = int(rng.integers(0, 3)) if rows > 3 else 0
        table = torch.full((rows, width), STALE, dtype=torch.int32)
        lengths, counts = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for row in range(rows - padding):
            lengths[row] = rng.integers(1, width * block_size + 1)
            chunk = rng.random() < 0.4
            counts[row] = rng.integers(1, lengths[row] + 1) if chunk else 1
            used = -(-lengths[row] // block_size)
            ids = rng.integers(1, 10_000, used)
            # Holes precede the queries of the step.
            old = (lengths[row] - counts[row]) // block_size
            ids[:old][rng.random(old) < rng.choice([0.0, 0.5, 1.0])] = 0
            table[row, :used] = torch.from_numpy(ids)
        slots = np.where(rng.random(rows) < 0.7, rng.permutation(rows + 2)[:rows], -1)
        slots[rows - padding :] = -1
        return cls(
            table,
            torch.from_numpy(lengths),
            torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32)),
            torch.from_numpy(slots.astype(np.int32)),
            block_size,
        )

    def expected_table(self) -> tuple[list[Tensor], Tensor]:
        """The used entries of each row, and the live lengths."""
        live = squeeze(self.block_table, self.seq_lens, self.block_size)
        used = -(-self.seq_lens // self.block_size)
        rows = [row[:count] for row, count in zip(live.block_table, used.tolist(), strict=True)]
        return rows, live.seq_lens

    def expected_places(self, window: int, capacity: int) -> Tensor:
        index = RingIndex(window, capacity, torch.device("cpu"))
        starts, lengths = self.query_starts.tolist(), self.seq_lens.tolist()
        index.fill(
            [
                (Recording(slot=slot, num_tokens=lengths[row]), starts[row], starts[row + 1])
                for row, slot in enumerate(self.slots.tolist())
                if slot >= 0
            ]
        )
        return index.places


class Outputs:
    """Persistent buffers of an earlier, larger step."""

    def __init__(self, batch: Batch, capacity: int, device: torch.device) -> None:
        rows, width = batch.block_table.shape
        self.table = torch.full((rows + 2, width + 5), STALE, dtype=torch.int32, device=device)
        self.lens = torch.full((rows + 2,), STALE, dtype=torch.int32, device=device)
        self.places = torch.full((capacity,), STALE, dtype=torch.int32, device=device)

    def check_table(self, batch: Batch) -> None:
        expected, lens = batch.expected_table()
        rows = len(expected)
        for row, ids in enumerate(expected):
            assert torch.equal(self.table[row, : len(ids)].cpu(), ids)
            assert (self.table[row, len(ids) :] == STALE).all()
        assert torch.equal(self.lens[:rows].cpu(), lens)
        assert (self.table[rows:] == STALE).all() and (self.lens[rows:] == STALE).all()


def run(batch: Batch, window: int, spare: int, device: torch.device) -> Outputs:
    capacity = int(batch.query_starts[-1]) + spare
    outputs = Outputs(batch, capacity, device)
    prepare_step(
        batch.block_table.to(device),
        batch.seq_lens.to(device),
        batch.query_starts.to(device),
        batch.slots.to(device),
        block_size=batch.block_size,
        window=window,
        live_table=outputs.table,
        live_lens=outputs.lens,
        places=outputs.places,
    )
    return outputs


@pytest.mark.parametrize("seed", range(24))
def test_a_step_is_prepared_as_on_the_host(
    seed: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small tiles, so that small tables take several of them.
    monkeypatch.setattr(module, "TILE", 16)
    window = (1, 4, 7, 16)[seed % 4]
    batch = Batch.random(
        seed, rows=1 + seed % 6, width=3 + 13 * (seed % 4), block_size=(3, 8)[seed % 2]
    )
    outputs = run(batch, window, (0, 1, 40)[seed % 3], device)
    outputs.check_table(batch)
    expected = batch.expected_places(window, len(outputs.places))
    assert torch.equal(outputs.places.cpu(), expected)


def test_a_step_is_prepared_with_the_tiles_that_ship(device: torch.device) -> None:
    batch = Batch.random(99, rows=3, width=1100, block_size=2)
    outputs = run(batch, 16, 1025, device)
    outputs.check_table(batch)
    assert torch.equal(outputs.places.cpu(), batch.expected_places(16, len(outputs.places)))


def test_rows_that_pad_the_batch_and_rows_without_slots_have_no_places(
    device: torch.device,
) -> None:
    batch = Batch(
        block_table=torch.tensor([[0, 5, 6], [0, 0, 9], [STALE] * 3, [STALE] * 3]).int(),
        seq_lens=torch.tensor([10, 12, 0, 0]).int(),
        query_starts=torch.tensor([0, 3, 4, 4, 4]).int(),
        slots=torch.tensor([2, -1, -1, -1]).int(),
        block_size=4,
    )
    outputs = run(batch, window=2, spare=3, device=device)
    assert outputs.places.tolist() == [-1, 4, 5, -1, -1, -1, -1]
    assert outputs.table[:2, :3].tolist() == [[5, 6, 0], [9, 0, 0]]
    assert outputs.lens.tolist() == [6, 4, 0, 0, STALE, STALE]


@pytest.mark.parametrize("seed", range(6))
def test_squeezing_alone_gives_the_same_table(seed: int, device: torch.device) -> None:
    batch = Batch.random(100 + seed, rows=1 + seed, width=19, block_size=16)
    outputs = Outputs(batch, 1, device)
    # A table of the runner, of which the batch is a part: rows are apart.
    wide = torch.full((1 + seed, 31), STALE, dtype=torch.int32, device=device)
    wide[:, :19] = batch.block_table
    squeeze_live_table(
        wide[:, :19],
        batch.seq_lens.to(device),
        block_size=16,
        live_table=outputs.table,
        live_lens=outputs.lens,
    )
    outputs.check_table(batch)
    assert outputs.places.tolist() == [STALE]


def test_refusals_name_the_argument(device: torch.device) -> None:
    batch = Batch.random(1, rows=2, width=3, block_size=4)
    tensors = dict(
        block_table=batch.block_table.to(device),
        seq_lens=batch.seq_lens.to(device),
        query_starts=batch.query_starts.to(device),
        slots=batch.slots.to(device),
        live_table=torch.zeros(2, 3, dtype=torch.int32, device=device),
        live_lens=torch.zeros(2, dtype=torch.int32, device=device),
        places=torch.zeros(40, dtype=torch.int32, device=device),
    )
    bad = dict(
        block_table=tensors["block_table"].long(),
        seq_lens=tensors["seq_lens"][:1],
        query_starts=tensors["query_starts"][:2],
        slots=tensors["slots"].long(),
        live_table=tensors["live_table"][:, :2],
        live_lens=tensors["live_lens"][:1],
        places=tensors["places"].float(),
    )
    for name, tensor in bad.items():
        with pytest.raises(ValueError, match=f"prepare_step: .*{name} must"):
            prepare_step(**(tensors | {name: tensor}), block_size=4, window=2)
    with pytest.raises(ValueError, match="live_table must not be block_table"):
        prepare_step(**(tensors | {"live_table": tensors["block_table"]}), block_size=4, window=2)
