# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The CUDA operators' own source, run on the host with threads in random order, and their checks.

What this cannot show is what a device adds: memory that several multiprocessors see, and speed."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gkv_vllm.ops import schemas

from . import cuda_cases as cases

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
assert schemas.library is not None


class Emulated:
    """`torch.ops.gkv_emulated`: the operators by name, and what they launched."""

    def __init__(self, path: Path) -> None:
        self.library = torch.library.Library("gkv_emulated", "DEF")  # noqa: TOR901
        for name in cases.OPERATORS:
            schema = str(getattr(torch.ops.gkv, name).default._schema)
            self.library.define(schema.removeprefix("gkv::"))
        self.compiled = ctypes.CDLL(str(path))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(torch.ops.gkv_emulated, name)

    def seed(self, seed: int) -> None:
        self.compiled.emulated_seed(seed)

    def launches(self) -> tuple[int, int]:
        """Since the last call: all, and those that read 16 bytes at a time."""
        every, wide = ctypes.c_int(), ctypes.c_int()
        self.compiled.emulated_launches(ctypes.byref(every), ctypes.byref(wide))
        return every.value, wide.value


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        pytest.skip("no headers of Python")
    path = tmp_path_factory.mktemp("emulated") / "emulated.so"
    macros = {
        "GKV_EMULATED": "1",
        "USE_CUDA": "1",
        "TORCH_TARGET_VERSION": "0x020b000000000000",
        "Py_LIMITED_API": "0x030b0000",
        "GKV_ARCHITECTURES": '"host"',
    }
    done = subprocess.run(
        [
            compiler,
            *("-std=c++20", "-O2", "-g0", "-fPIC", "-shared", "-fvisibility=hidden"),
            *("-Wall", "-Werror", *(f"-D{name}={value}" for name, value in macros.items())),
            *("-isystem", TORCH / "include", "-isystem", sysconfig.get_path("include")),
            *("-I", "csrc/cuda", "csrc/cuda/ops.cpp", "tests/csrc/emulate.cpp"),
            *("-L", TORCH / "lib", "-ltorch_cpu", "-o", path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return Emulated(path)


# ---- compaction


@pytest.mark.parametrize("targets", cases.TARGETS)
@pytest.mark.parametrize("shape", cases.SHAPES.values(), ids=cases.SHAPES)
def test_every_survivor_moves_and_nothing_else_changes(
    ops: Emulated, shape: cases.Shape, targets: str
) -> None:
    for seed in range(6):
        ops.seed(seed)
        case = cases.compaction(shape, targets, seed)
        expected = case.expected()
        ops.compact_layers(*case.arguments())
        case.assert_same_memory(expected)


def test_cases_move_tokens_in_both_directions_and_leave_some() -> None:
    """Of the random cases themselves: they hold what the kernel has to get right."""
    left = right = stay = 0
    for seed in range(6):
        case = cases.compaction(cases.SHAPES["tiles_of_16_rows"], "scattered", seed)
        size = case.kv_caches[0].shape[2]
        to = (case.target_places[0].long()[:, None] * size + torch.arange(size)).flatten()
        left += int((case.keep[0] > to).sum())
        right += int((case.keep[0] < to).sum())
        stay += int((case.keep[0] == to).sum())
    assert min(left, right, stay) >= 32  # several tiles


def test_rows_of_whole_vectors_are_moved_16_bytes_at_a_time(ops: Emulated) -> None:
    ops.launches()
    for name, wide in (
        ("qwen3_8b", 1),
        ("head_dim_96_ragged_5_heads", 1),
        ("odd_head_dim", 0),
        ("rows_with_padding", 0),
    ):
        ops.compact_layers(*cases.compaction(cases.SHAPES[name], "leading", 1).arguments())
        assert ops.launches() == (1, wide), name


def test_more_layers_than_a_launch_takes_are_all_moved(ops: Emulated) -> None:
    case = cases.compaction(cases.Shape(4, kv_heads=1, layers=261, sources=4), "scattered", 1)
    expected = case.expected()
    ops.launches()
    ops.compact_layers(*case.arguments())
    assert ops.launches()[0] == 3
    case.assert_same_memory(expected)


def test_one_keep_and_one_table_may_serve_all_layers(ops: Emulated) -> None:
    case = cases.compaction(cases.Shape(64, layers=3), "leading", 5)
    for name in ("source_ids", "target_ids", "keep"):
        tensor = getattr(case, name)
        setattr(case, name, tensor[:1].expand_as(tensor))
    expected = case.expected()
    ops.compact_layers(*case.arguments())
    case.assert_same_memory(expected)


def test_without_targets_nothing_is_launched(ops: Emulated) -> None:
    case = cases.compaction(cases.Shape(64), "leading", 5)
    case.target_ids, case.target_places = case.target_ids[:, :0], case.target_places[:, :0]
    case.keep = case.keep[..., :0]
    ops.launches()
    ops.compact_layers(*case.arguments())
    assert ops.launches() == (0, 0)


def wrong_compactions() -> dict[str, tuple[str, Callable[[cases.Compaction], None]]]:
    def change(name: str, new: Callable[[Any], Any]) -> Callable[[cases.Compaction], None]:
        return lambda case: setattr(case, name, new(getattr(case, name)))

    return {
        "no layers": ("kv_caches must name at least one", change("kv_caches", lambda x: [])),
        "three dimensions": (
            r"kv_caches must be \[num_blocks, kv_heads",
            change("kv_caches", lambda x: [y[0] for y in x]),
        ),
        "unlike layers": ("must agree in shape", change("kv_caches", lambda x: [x[0], x[1][:-1]])),
        "integers": (
            "kv_caches must be float32",
            change("kv_caches", lambda x: [y.view(torch.int16) for y in x]),
        ),
        "too few planes": ("planes must be empty or one for", change("planes", lambda x: x[:1])),
        "plane of another type": (
            r"need planes \[num_blocks, kv_heads",
            change("planes", lambda x: [y.double() for y in x]),
        ),
        "sources of one layer": (r"need source_ids", change("source_ids", lambda x: x[:1])),
        "more sources than layers": (
            r"need source_ids",
            change("source_ids", lambda x: x.repeat(2, 1)),
        ),
        "int32 targets": (r"need target_ids", change("target_ids", lambda x: x.int())),
        "int64 places": (r"need target_places", change("target_places", lambda x: x.long())),
        "keep of three heads": (
            r"keep must be \[layers, kv_heads or 1",
            change("keep", lambda x: x[:, :1].expand(-1, 3, -1)),
        ),
        "too few survivors": (r"need keep", change("keep", lambda x: x[..., 1:])),
        "a strided keep": (
            r"need keep",
            change("keep", lambda x: x.repeat_interleave(2, -1)[..., ::2]),
        ),
    }


@pytest.mark.parametrize(
    ("message", "spoil"), wrong_compactions().values(), ids=wrong_compactions()
)
def test_compaction_names_the_argument_that_does_not_fit(
    ops: Emulated, message: str, spoil: Callable[[cases.Compaction], None]
) -> None:
    case = cases.compaction(cases.Shape(64), "leading", 1)
    spoil(case)
    before = [x.clone() for x in case.memory]
    with pytest.raises(RuntimeError, match=f"compact_layers: .*{message}"):
        ops.compact_layers(*case.arguments())
    assert all(cases.same_bits(x, y) for x, y in zip(case.memory, before, strict=True))


# ---- the step


@pytest.mark.parametrize(
    ("rows", "width", "block_size", "window"),
    [(1, 1, 16, 16), (5, 63, 16, 8), (33, 40, 8, 16), (9, 700, 1, 5), (3, 2600, 16, 32)],
)
def test_live_tables_lengths_and_places_are_those_of_the_host(
    ops: Emulated, rows: int, width: int, block_size: int, window: int
) -> None:
    for seed in range(8):
        ops.seed(seed)
        case = cases.step(seed, rows, width, block_size=block_size, window=window)
        found = case.outputs()
        ops.launches()
        ops.prepare_step(*case.arguments(), *found)
        assert ops.launches()[0] == 1
        for name, mine, oracle in zip(
            ("table", "lens", "places"), found, case.expected(), strict=True
        ):
            assert torch.equal(mine, oracle), (seed, name)


def test_places_are_cleared_in_a_step_without_rows(ops: Emulated) -> None:
    case = cases.step(0, 0, 4)
    case.capacity = 1000
    table, lens, places = case.outputs()
    ops.prepare_step(*case.arguments(), table, lens, places)
    assert (places == -1).all() and (table == cases.UNTOUCHED).all()


def test_rows_of_a_table_may_lie_apart(ops: Emulated) -> None:
    case = cases.step(3, 6, 20)
    wide = torch.full((6, 31), 5, dtype=torch.int32)
    wide[:, :20] = case.block_table
    case.block_table = wide[:, :20]
    found = case.outputs()
    ops.prepare_step(*case.arguments(), *found)
    for mine, oracle in zip(found, case.expected(), strict=True):
        assert torch.equal(mine, oracle)


def test_a_length_beyond_the_table_reads_and_writes_only_the_table(ops: Emulated) -> None:
    """A dummy batch may say so while a graph is captured."""
    table = torch.tensor([[3, 0, 4, 9]], dtype=torch.int32)[:, :3]
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([1000], [0, 1], [-1])]
    live, lens, places = (torch.full(x, -7, dtype=torch.int32) for x in ((1, 5), (1,), (2,)))
    ops.prepare_step(table, *ints, 16, 4, live, lens, places)
    assert live.tolist() == [[3, 4, 0, -7, -7]]


@pytest.mark.parametrize(
    ("message", "index", "new"),
    [
        (r"need block_table \[rows, width\]", 0, lambda x: x[:2]),
        (r"need seq_lens \[rows\] int32", 1, lambda x: x.long()),
        (r"need query_starts \[rows \+ 1\]", 2, lambda x: x[1:]),
        (r"need slots", 3, lambda x: x[:1]),
        ("block_size and window must be positive", 4, lambda x: 0),
        ("block_size and window must be positive", 5, lambda x: -1),
        (r"live_table must have 9 columns at least, not 8", 6, lambda x: x[:, :8]),
        (r"need live_table", 6, lambda x: x[:2]),
        (r"need live_lens", 7, lambda x: x[:2]),
        (r"need places \[tokens\] int32", 8, lambda x: x.float()),
    ],
)
def test_the_step_names_the_argument_that_does_not_fit(
    ops: Emulated, message: str, index: int, new: Callable[[Any], Any]
) -> None:
    case = cases.step(0, 3, 9)
    arguments = [*case.arguments(), *case.outputs()]
    arguments[index] = new(arguments[index])
    with pytest.raises(RuntimeError, match=f"prepare_step: {message}"):
        ops.prepare_step(*arguments)


# ---- window queries


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "wide"),
    [
        (32, 128, torch.bfloat16, 1),
        (5, 64, torch.float16, 1),
        (3, 96, torch.float32, 1),
        (2, 7, torch.float16, 0),
    ],
)
def test_queries_with_a_place_are_stored_and_no_others(
    ops: Emulated, heads: int, head_dim: int, dtype: torch.dtype, wide: int
) -> None:
    for seed in range(4):
        case = cases.queries(seed, heads, head_dim, dtype)
        expected = case.expected()
        ops.launches()
        ops.store_window_queries(case.queries, case.places, case.ring)
        assert ops.launches() == (1, wide)
        assert cases.same_bits(case.ring, expected)


@pytest.mark.parametrize(
    ("message", "spoil"),
    [
        (
            "must both be .tokens, query_heads, head_dim",
            lambda q, p, r: (q, p, r[..., :32].contiguous()),
        ),
        ("must both be", lambda q, p, r: (q.transpose(1, 2), p, r.transpose(1, 2).contiguous())),
        ("must both be", lambda q, p, r: (q.float(), p, r)),
        (r"need places \[tokens\] int32", lambda q, p, r: (q, p[:9], r)),
        ("must be float32, bfloat16 or float16", lambda q, p, r: (q.double(), p, r.double())),
        ("multiples of 4 bytes", lambda q, p, r: (q[..., :63], p, r[..., :63].contiguous())),
    ],
)
def test_storing_names_the_argument_that_does_not_fit(
    ops: Emulated, message: str, spoil: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
) -> None:
    case = cases.queries(0, 1, 64, torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"store_window_queries: .*{message}"):
        ops.store_window_queries(*spoil(case.queries, case.places, case.ring))
