# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Every kernel compiles for a GPU that is not there, without spilling registers.

In processes of their own: here kernels are interpreted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gkv_vllm.triton_kernels as package
import pytest

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "sm90" / "triton.json"
COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=COMPILED, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("compile") / "triton.json"
    python("-m", "gkv_vllm.triton_kernels.compile", "--json", str(file))
    return json.loads(file.read_text())["kernels"]


def test_every_kernel_compiles_and_no_hot_one_spills(rows: list[dict[str, Any]]) -> None:
    assert rows
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert not (row["hot"] and row["spills"]), row
        # What a block may have on every GPU since sm_80.
        assert row["shared"] <= 163 * 1024


def test_no_kernel_is_left_out(rows: list[dict[str, Any]]) -> None:
    (folder,) = package.__path__
    defined = {
        (file.stem, kernel)
        for file in Path(folder).glob("*.py")
        for kernel in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert {(row["file"], row["kernel"]) for row in rows} == defined


def test_the_recorded_table_has_every_kernel(rows: list[dict[str, Any]]) -> None:
    """If not: python -m gkv_vllm.triton_kernels.compile --target cuda:90 cuda:100 --json FILE"""
    recorded = json.loads(RECORD.read_text())["kernels"]
    on_hopper = {
        (row["file"], row["kernel"], row["name"]) for row in recorded if row["target"] == "cuda:90"
    }
    assert on_hopper == {(row["file"], row["kernel"], row["name"]) for row in rows}


def test_compaction_reads_a_tile_before_it_writes_it_and_moves_16_bytes_at_a_time() -> None:
    """The interpreter cannot show it: there a tile is one thread."""
    script = """
import json
from gkv_vllm.triton_kernels.compact import SIGNATURES
from gkv_vllm.triton_kernels.compile import compile_kernel
print(json.dumps([[s.name, compile_kernel(s).asm["ptx"]] for s in SIGNATURES]))
"""
    letters = {"ld.global.v4.b32": "L", "st.global.v4.b32": "S", "bar.sync": "B"}
    of_plane = {"ld.global.b32": "L", "st.global.b32": "S", "bar.sync": "B"}
    for name, ptx in json.loads(python("-c", script)):
        assert "cp.async" not in ptx, "a pipeline would read ahead of the barrier"
        # Keys and values, leftwards and rightwards.
        for instructions, loops in ((letters, 4), (of_plane, 2 if "planes" in name else 0)):
            found = re.findall(r"bar\.sync|(?:ld|st)\.global[.\w]*", ptx)
            order = "".join(instructions.get(x, "") for x in found)
            assert re.fullmatch(rf"(B*L+B+S+B+){{{loops}}}B*", order), (name, order)


def test_spills_and_wrong_signatures_are_found(tmp_path: Path) -> None:
    (tmp_path / "hungry.py").write_text("""
import triton
import triton.language as tl


@triton.jit
def hungry(numbers, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    held = tl.load(numbers + at)
    tl.store(numbers + at, held - tl.sum(held, 0))
""")
    script = f"""
import sys
from dataclasses import replace

from gkv_vllm.triton_kernels.compile import compile_signature
from gkv_vllm.triton_kernels.signatures import Signature

sys.path.insert(0, {str(tmp_path)!r})
from hungry import hungry

types, few, many = {{"numbers": "*fp32"}}, {{"TILE": 1024}}, {{"TILE": 8192}}
good = Signature(kernel=hungry, name="", signature=types, constexprs=few, num_warps=1)
assert compile_signature(good).spills == 0
assert compile_signature(replace(good, constexprs=many)).spills > 0

for bad, says in (
    (replace(good, constexprs={{}}), "must name each of"),
    (replace(good, divisible_by_16=("TILE",)), "must name run-time arguments"),
):
    try:
        compile_signature(bad)
    except ValueError as error:
        assert says in str(error), error
    else:
        raise AssertionError(says)
"""
    python("-c", script)


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from gkv_vllm.triton_kernels.compile import compile_signature
    from gkv_vllm.triton_kernels.topk import SIGNATURES

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        compile_signature(SIGNATURES[0])
