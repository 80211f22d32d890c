# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The CUDA operators on a device, against the oracles on the host: `pytest -m gpu`.

The same cases run without a device in tests/csrc/test_cuda_emulated.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gkv_vllm.ops import schemas

from ..csrc import cuda_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
assert schemas.library is not None
gkv = torch.ops.gkv


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("gkv_vllm.ops._cuda", reason="built without nvcc")


@pytest.mark.parametrize("targets", cases.TARGETS)
@pytest.mark.parametrize("shape", cases.SHAPES.values(), ids=cases.SHAPES)
def test_every_survivor_moves_and_nothing_else_changes(shape: cases.Shape, targets: str) -> None:
    for seed in range(4):
        case = cases.compaction(shape, targets, seed)
        there = case.to("cuda")
        gkv.compact_layers(*there.arguments())
        there.assert_same_memory(case.expected())


@pytest.mark.parametrize("targets", cases.TARGETS)
def test_a_long_request_in_all_layers_of_a_model(targets: str) -> None:
    """Enough blocks to fill every multiprocessor, and tiles enough for their warps to drift."""
    shape = cases.Shape(kv_heads=8, layers=36, sources=40)
    case = cases.compaction(shape, targets, 1)
    there = case.to("cuda")
    gkv.compact_layers(*there.arguments())
    there.assert_same_memory(case.expected())


@pytest.mark.parametrize(
    ("rows", "width", "block_size", "window"),
    [(1, 1, 16, 16), (5, 63, 16, 8), (256, 40, 8, 16), (9, 700, 1, 5), (3, 2600, 16, 32)],
)
def test_live_tables_lengths_and_places_are_those_of_the_host(
    rows: int, width: int, block_size: int, window: int
) -> None:
    for seed in range(4):
        case = cases.step(seed, rows, width, block_size=block_size, window=window)
        found = case.outputs("cuda")
        gkv.prepare_step(*case.arguments("cuda"), *found)
        for mine, oracle in zip(found, case.expected(), strict=True):
            assert torch.equal(mine.cpu(), oracle)


def test_places_are_cleared_in_a_step_without_rows() -> None:
    case = cases.step(0, 0, 4)
    case.capacity = 1000
    table, lens, places = case.outputs("cuda")
    gkv.prepare_step(*case.arguments("cuda"), table, lens, places)
    assert (places == -1).all() and (table == cases.UNTOUCHED).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "head_dim"), [(32, 128), (5, 64), (2, 6)])
def test_queries_with_a_place_are_stored_and_no_others(
    heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    case = cases.queries(1, heads, head_dim, dtype)
    there = case.to("cuda")
    gkv.store_window_queries(there.queries, there.places, there.ring)
    assert cases.same_bits(there.ring, case.expected())


def captured(launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph


def test_a_graph_captured_once_follows_its_inputs() -> None:
    """New numbers at the same addresses, as in every step of a served model."""
    case = cases.step(1, 33, 40)
    case.capacity = 33 * 60  # room for the largest chunks of all rows
    arguments, found = case.arguments("cuda"), case.outputs("cuda")
    queries = cases.queries(1, 5, 64, torch.bfloat16).to("cuda")
    before = queries.ring.clone()

    def launch() -> None:
        gkv.prepare_step(*arguments, *found)
        gkv.store_window_queries(queries.queries, queries.places, queries.ring)

    graph = captured(launch)
    assert cases.same_bits(queries.ring, before)  # captured, not run
    for seed in range(2, 6):
        new = cases.step(seed, 33, 40)
        new.capacity = case.capacity
        for here, there in zip(new.arguments()[:4], arguments[:4], strict=True):
            there.copy_(here)
        for x in found:
            x.fill_(cases.UNTOUCHED)
        graph.replay()
        for mine, oracle in zip(found, new.expected(), strict=True):
            assert torch.equal(mine.cpu(), oracle)
    expected = cases.queries(1, 5, 64, torch.bfloat16).expected()
    assert cases.same_bits(queries.ring, expected)


def test_launches_go_to_the_current_stream() -> None:
    """Compaction behind a long wait on another stream must not run before it."""
    case = cases.compaction(cases.SHAPES["qwen3_8b"], "leading", 3)
    there, stream = case.to("cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    late = [x.clone() for x in there.memory]
    for x in there.memory:
        x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, y in zip(there.memory, late, strict=True):
            x.copy_(y)
        gkv.compact_layers(*there.arguments())
    stream.synchronize()
    there.assert_same_memory(case.expected())


def test_tensors_of_two_devices_are_refused() -> None:
    there = cases.compaction(cases.Shape(64), "leading", 1).to("cuda")
    there.keep = there.keep.cpu()
    with pytest.raises(RuntimeError, match="keep .* must be on the device of the other tensors"):
        gkv.compact_layers(*there.arguments())
