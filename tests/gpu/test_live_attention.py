# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""vLLM's own paged attention over live tables is dense attention over exactly the survivors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gkv_vllm.ops import live_table
from gkv_vllm.ops.paged import PagedOps, ReferenceOps
from gkv_vllm.ops.triton import TritonOps

from .survivors import MIXED, NUM_BLOCKS, SHAPES, Batch, Shape, Unified, check

pytestmark = [
    pytest.mark.gpu,
    # The rows of a tile that belong to no query, which are not stored.
    pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning"),
]

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
WINDOW = 4


def on_host(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    live = live_table.squeeze(batch.table, batch.seq_lens, batch.shape.block_size)
    return live.block_table.to(device), live.seq_lens.to(device)


def on_device(ops: PagedOps) -> Callable[[Batch, torch.device], tuple[Tensor, Tensor]]:
    """Into the buffers of an earlier, larger step, which held blocks that are gone."""

    def prepare(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        rows, width = batch.table.shape
        table = torch.full((rows, width), batch.stale_id, dtype=torch.int32, device=device)
        lens = torch.zeros(rows, dtype=torch.int32, device=device)
        places = torch.zeros(len(batch.queries), dtype=torch.int32, device=device)
        ops.prepare_step(
            batch.table.to(device),
            batch.seq_lens.to(device),
            batch.query_starts.to(device),
            torch.arange(rows, dtype=torch.int32, device=device),
            batch.shape.block_size,
            WINDOW,
            table,
            lens,
            places,
        )
        return table, lens

    return prepare


TRITON = on_device(TritonOps())
OTHERS = {"host": on_host, "reference": on_device(ReferenceOps())}
if torch.cuda.is_available():
    try:
        from gkv_vllm.ops.cuda import CUDAOps
    except ImportError:  # built without nvcc
        pass
    else:
        OTHERS["cuda"] = on_device(CUDAOps())


def unified(
    batch: Batch, live: tuple[Tensor, Tensor], device: torch.device, segments: int | None = None
) -> Tensor:
    queries = batch.queries.to(device)
    out = torch.full_like(queries, float("nan"))
    table, lens = live
    Unified(batch.shape, max_tokens=len(queries), segments=segments)(
        queries,
        batch.cache.to(device),
        out,
        table=table,
        lens=lens,
        starts=batch.query_starts.to(device),
        max_queries=max(len(request.queries) for request in batch.requests),
        max_len=int(lens.max()),
    )
    return out


@shapes
def test_a_mixed_batch_attends_to_exactly_the_survivors(
    shape: Shape, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """In half precision too, where one shape is enough."""
    for seed, dtype in enumerate(dtypes[: 1 + (shape is SHAPES["ragged"])]):
        batch = Batch(shape, MIXED, dtype, seed=seed, num_blocks=NUM_BLOCKS)
        assert sum(batch.holes) > 10
        check(unified(batch, TRITON(batch, device), device), batch)


@pytest.mark.parametrize("prepare", OTHERS.values(), ids=OTHERS)
def test_every_form_of_the_live_table_will_do(
    prepare: Callable[..., tuple[Tensor, Tensor]],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    batch = Batch(SHAPES["gqa7"], MIXED, dtypes[0], seed=5, num_blocks=NUM_BLOCKS)
    check(unified(batch, prepare(batch, device), device), batch)


@shapes
def test_a_decode_whose_keys_are_split_attends_to_exactly_the_survivors(
    shape: Shape, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """The schedule of the split comes from live lengths, as the table does."""
    rows = [(tokens, 1, share) for tokens, _, share in MIXED]
    batch = Batch(shape, rows, dtypes[0], seed=3, num_blocks=NUM_BLOCKS)
    check(unified(batch, TRITON(batch, device), device, segments=4), batch)


def test_the_table_with_holes_would_not_do(
    device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Rows that lost blocks are NaN without a live table, so the tests above see a hole."""
    batch = Batch(SHAPES["gqa4"], MIXED, dtypes[0], seed=0, num_blocks=NUM_BLOCKS)
    out = unified(batch, (batch.table.to(device), batch.seq_lens.to(device)), device).cpu()
    starts = batch.query_starts.tolist()
    for row, holes in enumerate(batch.holes):
        assert out[starts[row] : starts[row + 1]].isnan().any() == (holes > 0)
