# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Builds the CUDA operators with nvcc and records what their kernels take of a GPU; needs no GPU.

    python csrc/cuda/build.py                  # gkv_vllm/ops/_cuda.abi3.so
    python csrc/cuda/build.py --output X.so --arch 90
    python csrc/cuda/build.py --record benchmarks/results/sm90/cuda.json   # resources, no library

torch's stable ABI makes one library serve every torch from 2.11 on, and torch's CPU build has all
headers it takes, so any machine with the toolkit builds it. libtorch_cuda, which that torch lacks,
is stood in for by an empty library of its name while linking."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "gkv_vllm" / "ops" / "_cuda.abi3.so"
FOLDER = "csrc/cuda"  # compiled from the root, so that messages name no machine's folders
KERNELS = ("compact.cu", "step.cu")
SOURCES = (*KERNELS, "ops.cpp")
ARCHITECTURES = ("80", "90", "100")
TORCH_ABI = "0x020b000000000000"  # 2.11, as for the CPU's library
PYTHON_ABI = "0x030b0000"


class BuildError(RuntimeError):
    """Says which command failed, with what it printed, or what is missing."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, as ptxas counts it."""

    registers: int
    spill_bytes: int
    """Stores and loads of registers that had no room."""
    stack_bytes: int
    shared_bytes: int


def toolkit() -> Path | None:
    """Where the CUDA toolkit is: CUDA_HOME, or the nvcc on PATH; None without one."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return Path(home) if (Path(home) / "bin" / "nvcc").is_file() else None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # The nvcc on PATH may be a script that calls the real one; nvcc itself knows its home.
    listed = _run(nvcc, "--dryrun", "-x", "cu", "-E", "/dev/null")
    home = re.search(r"^#\$ TOP=(.+)$", listed, re.MULTILINE)
    return Path(home[1].strip()).resolve() if home else Path(nvcc).resolve().parents[1]


def build(output: Path = LIBRARY, architectures: tuple[str, ...] | None = None) -> Path:
    """Compile all sources and link them into `output`; BuildError where that fails."""
    torch = _torch()
    chosen = architectures or supported_architectures()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        objects = []
        for source in SOURCES:
            objects.append(str(Path(scratch) / f"{source}.o"))
            _run(*compile_command(source, chosen), "-c", "-o", objects[-1])
        stub = Path(scratch) / "libtorch_cuda.so"
        empty = ("-x", "c++", os.devnull, "-cudart", "none", "-Xlinker", f"-soname={stub.name}")
        _run(_nvcc(), "-shared", *empty, "-o", str(stub))
        libraries = (f"-L{scratch}", "-ltorch_cuda", f"-L{torch / 'lib'}", "-ltorch_cpu")
        needed = ("-Xlinker", "--no-as-needed", *libraries, "-cudart", "shared")
        _run(_nvcc(), "-shared", "-nodlink", *objects, *needed, "-o", str(output.resolve()))
    return output


def compile_command(source: str, architectures: tuple[str, ...]) -> tuple[str, ...]:
    """nvcc and its flags for one source, without what becomes of it."""
    macros = (
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={TORCH_ABI}",
        f"-DPy_LIMITED_API={PYTHON_ABI}",
        f'-DGKV_ARCHITECTURES="{",".join(f"sm_{x}" for x in architectures)}"',
    )
    torch = _torch() / "include"
    includes = ("-isystem", str(torch), "-isystem", sysconfig.get_path("include"))
    # Headers that check something name themselves in their messages.
    nameless = ("-Xcompiler", f"-ffile-prefix-map={torch.parent}=torch")
    return (
        _nvcc(),
        f"{FOLDER}/{source}",
        "-std=c++20",
        "-O3",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden,-Wall",
        *(code_for(architectures) if source.endswith(".cu") else (*macros, *includes, *nameless)),
    )


def code_for(architectures: tuple[str, ...]) -> tuple[str, ...]:
    """Machine code for each, and portable code of the last for GPUs that come after it."""
    code = [f"-gencode=arch=compute_{x},code=sm_{x}" for x in architectures]
    last = architectures[-1]
    return (*code, f"-gencode=arch=compute_{last},code=compute_{last}")


def supported_architectures() -> tuple[str, ...]:
    """Those of `ARCHITECTURES` that this nvcc compiles for."""
    listed = _run(_nvcc(), "--list-gpu-arch")
    return tuple(x for x in ARCHITECTURES if re.search(rf"\bcompute_{x}\b", listed))


def resources(source: str, architecture: str = "90") -> dict[str, Resources]:
    """What each kernel of a source takes on one architecture."""
    command = compile_command(source, (architecture,))
    flags = tuple(x for x in command if not x.startswith("-gencode"))
    report = _run(*flags, f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin", "-o", os.devnull)
    return parse_report(report)


def parse_report(report: str) -> dict[str, Resources]:
    """Reads what `ptxas -v` prints: one entry per kernel."""
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        stack, stores, loads = _numbers(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        (registers,) = _numbers(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[part.partition("'")[0]] = Resources(
            registers, stores + loads, stack, int(shared[1]) if shared else 0
        )
    return found


def record(architectures: tuple[str, ...]) -> dict[str, object]:
    """The resources of every kernel on every architecture, and the compiler."""
    version = re.search(r"release ([\d.]+), V([\d.]+)", _run(_nvcc(), "--version"))
    return {
        "nvcc": version[2] if version else None,
        "kernels": {
            name: {f"sm_{x}": asdict(resources(source, x)[name]) for x in architectures}
            for source in KERNELS
            for name in resources(source, architectures[0])
        },
    }


def _numbers(pattern: str, text: str) -> tuple[int, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise BuildError(f"ptxas did not print '{pattern}' but:\n{text}")
    return tuple(int(x) for x in found.groups())


def _toolkit() -> Path:
    found = toolkit()
    if found is None:
        raise BuildError("no CUDA toolkit: put nvcc on PATH, or set CUDA_HOME to where it is")
    return found


def _nvcc() -> str:
    return str(_toolkit() / "bin" / "nvcc")


def _torch() -> Path:
    found = find_spec("torch")
    if found is None or found.origin is None:
        raise BuildError("torch is not here; build with --no-build-isolation beside torch")
    return Path(found.origin).parent


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=LIBRARY, help="the library to write")
    parser.add_argument("--arch", action="append", help="such as 90; default: all it can")
    parser.add_argument("--record", type=Path, help="write the kernels' resources there instead")
    arguments = parser.parse_args()
    try:
        architectures = tuple(arguments.arch or supported_architectures())
        if arguments.record is None:
            build(arguments.output, architectures)
        else:
            arguments.record.parent.mkdir(parents=True, exist_ok=True)
            arguments.record.write_text(json.dumps(record(architectures), indent=1) + "\n")
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
