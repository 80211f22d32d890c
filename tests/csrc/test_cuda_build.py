# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What nvcc makes of the CUDA operators: registers, the library's symbols, and that it loads."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "sm90" / "cuda.json"
REGISTERS = 65536  # of one multiprocessor, on every architecture built for
OF_LIBTORCH_CUDA = {
    "aoti_torch_create_cuda_guard",
    "aoti_torch_delete_cuda_guard",
    "aoti_torch_get_current_cuda_stream",
}


def build_script() -> ModuleType:
    """csrc/cuda/build.py, which is in no package."""
    spec = importlib.util.spec_from_file_location(
        "gkv_cuda_build", ROOT / "csrc" / "cuda" / "build.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = build_script()
pytestmark = pytest.mark.skipif(build.toolkit() is None, reason="no nvcc")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cuda") / "_cuda.abi3.so"
    build.build(output, ("90",))
    return output


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)


# ---- kernels


@pytest.mark.parametrize("source", build.KERNELS)
def test_no_kernel_spills_and_as_many_blocks_fit_as_are_meant_to(source: str) -> None:
    found = build.resources(source)
    assert found
    for name, taken in found.items():
        assert (taken.spill_bytes, taken.stack_bytes) == (0, 0), name
        blocks = 5 if "compact" in name else 8
        assert blocks * 256 * taken.registers <= REGISTERS, name
        assert taken.shared_bytes <= 48 * 1024, name


def test_the_record_is_of_these_kernels() -> None:
    """Renew it with `python csrc/cuda/build.py --record benchmarks/results/sm90/cuda.json`."""
    recorded = json.loads(RECORD.read_text())
    found = build.record(("90",))
    assert recorded["kernels"].keys() == found["kernels"].keys()
    if recorded["nvcc"] == found["nvcc"]:
        assert {name: of["sm_90"] for name, of in recorded["kernels"].items()} == {
            name: of["sm_90"] for name, of in found["kernels"].items()
        }


def test_a_spill_is_read_from_the_compilers_report() -> None:
    report = """
ptxas info    : Compiling entry function 'small' for 'sm_90'
ptxas info    : Function properties for small
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 0 barriers
ptxas info    : Compiling entry function 'large' for 'sm_90'
ptxas info    : Function properties for large
    24 bytes stack frame, 20 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 24 bytes cumulative stack size, 15376 bytes smem
"""
    assert build.parse_report(report) == {
        "small": build.Resources(22, 0, 0, 0),
        "large": build.Resources(40, 52, 24, 15376),
    }


@pytest.mark.parametrize(
    ("source", "kernel"),
    [("compact.cu", "gkv_compact_wide"), ("step.cu", "gkv_store_queries_wide")],
)
def test_rows_are_read_and_written_16_bytes_at_a_time(
    source: str, kernel: str, tmp_path: Path
) -> None:
    output = tmp_path / "kernels.ptx"
    command = [x for x in build.compile_command(source, ("90",)) if not x.startswith("-gencode")]
    done = subprocess.run(
        [*command, "-arch=sm_90", "-ptx", "-o", output], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (body,) = re.findall(rf"\.entry {kernel}\(.*?^}}", output.read_text(), re.DOTALL | re.MULTILINE)
    assert re.search(r"\bld\.global\.v4\.[bu]32|\bld\.global\.v2\.[bu]64", body)
    assert re.search(r"\bst\.global\.v4\.[bu]32|\bst\.global\.v2\.[bu]64", body)
    # What was written in place is never read through the cache for constant data.
    assert "ld.global.nc.v" not in body


# ---- the library


def test_library_asks_for_stable_symbols_only(library: Path) -> None:
    """So that one file serves every torch from 2.11 and every CPython from 3.11 on."""
    symbols = run("nm", "-D", "--undefined-only", library).stdout.split("\n")
    names = {x.split()[-1] for x in symbols if " U " in x}
    of_torch = {x for x in names if re.match(r"(aoti_)?torch_", x)}
    rest = {
        x for x in names - of_torch if "@" not in x
    }  # with a version: of libc, libstdc++, cudart
    assert rest == {"PyModule_Create2", "PyUnicode_FromString"}
    assert not {x for x in names if re.match(r"_ZN?K?(2at|3c10|5torch)", x)}
    in_torch = run(
        "nm", "-D", "--defined-only", Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    )
    defined = {x.split()[-1] for x in in_torch.stdout.splitlines()}
    assert of_torch - defined <= OF_LIBTORCH_CUDA
    exported = run("nm", "-D", "--defined-only", library).stdout
    assert re.findall(r" T (\w+)", exported) == ["PyInit__cuda"]


def test_library_names_no_folder_of_the_machine_that_built_it(library: Path) -> None:
    assert str(ROOT).encode() not in library.read_bytes()
    assert "RUNPATH" not in run("readelf", "-d", library).stdout


LOAD = """
import sys, torch
from gkv_vllm.ops import schemas
sys.path.insert(0, sys.argv[1])
import _cuda
print(_cuda.architectures(), [name for name in sys.argv[2:]
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"gkv::{name}", "CUDA")])
"""


def load(library: Path, *folders: Path) -> subprocess.CompletedProcess[str]:
    paths = (*folders, build.toolkit() / "lib64")
    names = ("compact_layers", "prepare_step", "store_window_queries")
    return run(
        *(sys.executable, "-P", "-c", LOAD, library.parent, *names),
        LD_LIBRARY_PATH=":".join(str(x) for x in paths),
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has libtorch_cuda")
def test_without_libtorch_cuda_the_import_fails_and_with_it_the_operators_are_there(
    library: Path, tmp_path: Path
) -> None:
    """On torch for the CPU only that library is missing: a stand-in for it is enough to load."""
    alone = load(library)
    assert alone.returncode != 0
    assert "ImportError: libtorch_cuda.so" in alone.stderr
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    source = tmp_path / "stand_in.c"
    source.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in OF_LIBTORCH_CUDA))
    done = run(compiler, "-shared", "-fPIC", "-o", tmp_path / "libtorch_cuda.so", source)
    assert done.returncode == 0, done.stderr
    loaded = load(library, tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == (
        "sm_90 ['compact_layers', 'prepare_step', 'store_window_queries']"
    )


# ---- when setup.py builds it


def installed(
    folder: Path, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What setup.py does with no C++ compiler of its own, and the libraries it leaves."""
    command = (sys.executable, "setup.py", "build", "--build-base", folder, "--force")
    environ = {**os.environ, "CC": "false", "CXX": "false", **environment}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300
    )
    return done, [x.name for x in folder.rglob("*.so")]


def test_installing_builds_the_library_where_it_is_asked_for(tmp_path: Path) -> None:
    done, libraries = installed(tmp_path, GKV_BUILD_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert libraries == ["_cuda.abi3.so"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_beside_torch_for_the_cpu_it_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    done, libraries = installed(tmp_path, GKV_BUILD_CUDA="")
    assert done.returncode == 0, done.stderr
    assert libraries == []
    assert "gkv_vllm.ops._cuda" not in done.stdout + done.stderr


def test_asking_for_it_without_a_toolkit_is_an_error(tmp_path: Path) -> None:
    done, libraries = installed(tmp_path, GKV_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "no CUDA toolkit: put nvcc on PATH" in done.stdout + done.stderr
    assert libraries == []
