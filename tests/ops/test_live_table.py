# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Squeezing block tables: every property against a plain Python oracle; no kernel runs here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from gkv_vllm.attention.wrap import live_metadata, wrap_backend
from gkv_vllm.ops.live_table import NULL_BLOCK, LiveTable, squeeze

relaxed = settings(deadline=None)  # the clock of a busy machine says nothing about a table


@dataclass
class Table:
    """A padded block table as a runner keeps it, in plain Python."""

    rows: list[list[int]]
    lens: list[int]
    block_size: int

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        width = len(self.rows[0]) if self.rows else 0
        table = torch.tensor(self.rows, dtype=torch.int32).reshape(len(self.rows), width)
        return table, torch.tensor(self.lens, dtype=torch.int32)

    def squeezed(self) -> LiveTable:
        return squeeze(*self.tensors(), self.block_size)

    def used(self, row: int) -> list[int]:
        return self.rows[row][: -(-self.lens[row] // self.block_size)]

    def live(self, row: int) -> list[int]:
        return [block for block in self.used(row) if block != NULL_BLOCK]

    def has_holes(self) -> bool:
        return any(NULL_BLOCK in self.used(row) for row in range(len(self.rows)))


def make_table(block_size: int, shapes: list[tuple[int, int, set[int]]], extra: int = 0) -> Table:
    """Rows of (blocks, tokens in the last one, holes); beyond the used part lies garbage."""
    width = max((blocks for blocks, _, _ in shapes), default=0) + extra
    rows, lens = [], []
    for row, (blocks, tail, holes) in enumerate(shapes):
        ids = [1 + 100 * row + i for i in range(width)]
        for hole in holes:
            ids[hole] = NULL_BLOCK
        rows.append(ids)
        lens.append((blocks - 1) * block_size + tail if blocks else 0)
    return Table(rows, lens, block_size)


@st.composite
def tables(draw: st.DrawFn, holes: bool = True) -> Table:
    block_size = draw(st.sampled_from([1, 4, 32, 64]))
    shapes = []
    for _ in range(draw(st.integers(0, 5))):
        blocks = draw(st.integers(0, 7))
        tail = draw(st.integers(1, block_size))
        gaps = draw(st.sets(st.integers(0, blocks - 2))) if holes and blocks > 1 else set()
        shapes.append((blocks, tail, gaps))
    table = make_table(block_size, shapes, extra=draw(st.integers(0, 3)))
    for row, (blocks, _, _) in enumerate(shapes):  # stale entries: old ids, or null
        for i in range(blocks, len(table.rows[row])):
            table.rows[row][i] = draw(st.sampled_from([NULL_BLOCK, 7, 1 << 30]))
    return table


NAMED = {
    "one_hole": make_table(32, [(3, 32, {1})]),
    "ragged_63_tokens": make_table(32, [(2, 31, {0}), (1, 1, set()), (5, 7, {0, 2, 3})], extra=2),
    "only_the_tail_lives": make_table(64, [(6, 1, {0, 1, 2, 3, 4}), (6, 64, set())]),
    "empty_row_between": make_table(32, [(4, 5, {2}), (0, 0, set()), (2, 32, {0})], extra=1),
}
named = pytest.mark.parametrize("table", NAMED.values(), ids=NAMED)


def assert_matches_oracle(table: Table) -> None:
    live = table.squeezed()
    for row, tokens in enumerate(table.lens):
        expected = table.live(row)
        holes = len(table.used(row)) - len(expected)
        assert live.seq_lens[row] == tokens - holes * table.block_size
        assert live.block_table[row, : len(expected)].tolist() == expected


@named
def test_live_blocks_come_first_in_logical_order(table: Table) -> None:
    assert_matches_oracle(table)


@relaxed
@given(tables())
def test_any_ragged_table_matches_the_oracle(table: Table) -> None:
    assert_matches_oracle(table)


@relaxed
@given(tables())
def test_live_length_fits_the_live_blocks_exactly(table: Table) -> None:
    live = table.squeezed()
    for row in range(len(table.rows)):
        assert -(-int(live.seq_lens[row]) // table.block_size) == len(table.live(row))


@relaxed
@given(tables())
def test_beyond_the_live_part_a_squeezed_row_is_null(table: Table) -> None:
    if not table.has_holes():
        return
    live = table.squeezed()
    for row in range(len(table.rows)):
        assert not live.block_table[row, len(table.live(row)) :].any()


@relaxed
@given(tables(holes=False))
def test_without_holes_the_very_same_tensors_come_back(table: Table) -> None:
    block_table, seq_lens = table.tensors()
    live = squeeze(block_table, seq_lens, table.block_size)
    assert live.block_table is block_table
    assert live.seq_lens is seq_lens


@relaxed
@given(tables())
def test_inputs_are_never_written(table: Table) -> None:
    block_table, seq_lens = table.tensors()
    squeeze(block_table, seq_lens, table.block_size)
    before_table, before_lens = table.tensors()
    assert torch.equal(block_table, before_table)
    assert torch.equal(seq_lens, before_lens)


@relaxed
@given(tables())
def test_kernels_get_contiguous_int32(table: Table) -> None:
    for tensor in table.squeezed():
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()


@relaxed
@given(tables(), st.integers(0, 1 << 30))
def test_stale_entries_beyond_the_used_part_change_nothing(table: Table, stale: int) -> None:
    before = table.squeezed()
    for row, ids in enumerate(table.rows):
        used = len(table.used(row))
        ids[used:] = [stale] * (len(ids) - used)
    after = table.squeezed()
    assert torch.equal(after.seq_lens, before.seq_lens)
    for row in range(len(table.rows)):
        live = len(table.live(row))
        assert torch.equal(after.block_table[row, :live], before.block_table[row, :live])


@named
def test_squeezing_twice_is_squeezing_once(table: Table) -> None:
    once = table.squeezed()
    twice = squeeze(*once, table.block_size)
    assert twice.block_table is once.block_table
    assert twice.seq_lens is once.seq_lens


def metadata(table: Table, query_lens: list[int]) -> CommonAttentionMetadata:
    block_table, seq_lens = table.tensors()
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    tokens = int(starts[-1])
    positions = torch.cat(
        [torch.arange(n - q, n) for n, q in zip(table.lens, query_lens, strict=True)]
    )
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=len(query_lens),
        num_actual_tokens=tokens,
        max_query_len=max(query_lens),
        max_seq_len=max(table.lens),
        block_table_tensor=block_table,
        slot_mapping=torch.arange(tokens),
        positions=positions,
    )


RAGGED = make_table(32, [(2, 31, {0}), (5, 7, {0, 2, 3}), (3, 1, set())], extra=2)


def test_live_metadata_shortens_lengths_and_nothing_logical() -> None:
    logical = metadata(RAGGED, [1, 5, 1])
    logical.compute_num_computed_tokens()
    live = live_metadata(logical, RAGGED.block_size)
    assert live.seq_lens.tolist() == [31, 39, 65]
    assert live.max_seq_len == 65
    assert live.seq_lens_cpu_upper_bound is not None
    assert live.seq_lens_cpu_upper_bound.tolist() == [31, 39, 65]
    assert live.compute_num_computed_tokens().tolist() == [30, 34, 64]
    for kept in ("query_start_loc", "slot_mapping", "positions", "max_query_len", "causal"):
        assert getattr(live, kept) is getattr(logical, kept)


def test_live_metadata_leaves_the_step_itself_alone() -> None:
    logical = metadata(RAGGED, [1, 5, 1])
    live_metadata(logical, RAGGED.block_size)
    block_table, seq_lens = RAGGED.tensors()
    assert torch.equal(logical.block_table_tensor, block_table)
    assert torch.equal(logical.seq_lens, seq_lens)
    assert logical.max_seq_len == 135


def test_live_metadata_without_holes_is_the_very_same_object() -> None:
    whole = make_table(32, [(2, 31, set()), (1, 1, set())], extra=1)
    logical = metadata(whole, [1, 1])
    assert live_metadata(logical, whole.block_size) is logical


def test_a_wrapped_backend_is_its_base_to_vllm() -> None:
    wrapped = wrap_backend(CPUAttentionBackend)
    assert issubclass(wrapped, CPUAttentionBackend)
    assert wrapped.get_name() == CPUAttentionBackend.get_name()
    assert issubclass(wrapped.get_builder_cls(), CPUAttentionBackend.get_builder_cls())
    assert issubclass(wrapped.get_impl_cls(), CPUAttentionBackend.get_impl_cls())
