# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Trimming of device code, on objects that nvcc makes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from gpu import fatbin

SOURCE = """
__global__ void add(float* x, float y) { x[threadIdx.x] += y; }
extern "C" void launch(float* x) { add<<<1, 32>>>(x, 1.0f); }
extern "C" int answer() { return 42; }
"""
CODE = ("arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kernels' worth of fat binaries: sm_80, and sm_90 as machine code and as PTX."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("fatbin")
    sources = []
    for name in ("one", "two"):
        text = SOURCE.replace("launch", f"launch_{name}").replace("answer", f"answer_{name}")
        sources.append(folder / f"{name}.cu")
        sources[-1].write_text(text.replace("add", f"add_{name}"))
    made = folder / "lib.so"
    command = ["nvcc", *(f"-gencode={code}" for code in CODE), "-shared", "-nodlink"]
    command += ["-Xcompiler", "-fPIC"]
    subprocess.run([*command, *sources, "-o", made], check=True, timeout=120)
    return made


def payload(data: bytes, entry: fatbin.Entry) -> bytes:
    return data[entry.start : entry.end]


def test_every_piece_of_device_code_is_found(library: Path) -> None:
    found = fatbin.entries(library.read_bytes())
    machine, ptx = fatbin.MACHINE_CODE, fatbin.PTX
    kinds = sorted((entry.kind, entry.architecture) for entry in found)
    assert kinds == sorted([(machine, 80), (machine, 90), (ptx, 90)] * 2)
    assert all(any(payload(library.read_bytes(), entry)) for entry in found)


def test_other_architectures_are_zeroed_and_nothing_else_changes(library: Path) -> None:
    data = library.read_bytes()
    trimmed = fatbin.keep_only(data, 90)
    assert len(trimmed) == len(data)
    assert fatbin.entries(trimmed) == fatbin.entries(data)
    gone = [entry for entry in fatbin.entries(data) if entry.architecture != 90]
    expected = bytearray(data)
    for entry in gone:
        assert not any(payload(trimmed, entry))
        expected[entry.start : entry.end] = bytes(entry.end - entry.start)
    assert gone and trimmed == bytes(expected)


def test_a_trimmed_library_still_loads(library: Path, tmp_path: Path) -> None:
    trimmed = tmp_path / "trimmed.so"
    trimmed.write_bytes(fatbin.keep_only(library.read_bytes(), 90))
    assert ctypes.CDLL(str(trimmed)).answer_two() == 42


def test_trimming_again_changes_nothing(library: Path) -> None:
    once = fatbin.keep_only(library.read_bytes(), 90)
    assert fatbin.keep_only(once, 90) == once


def test_an_object_without_the_architecture_is_refused(library: Path) -> None:
    with pytest.raises(ValueError, match=r"no device code for sm_120, only for \[80, 90\]"):
        fatbin.keep_only(library.read_bytes(), 120)


def test_objects_without_device_code_stay_as_they_are() -> None:
    data = Path(shutil.which("true") or "/bin/true").read_bytes()
    assert fatbin.entries(data) == [] and fatbin.keep_only(data, 90) == data


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="not a 64-bit little-endian ELF file"):
        fatbin.entries(b"PK\x03\x04 a wheel")
