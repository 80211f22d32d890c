# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Makes a bundle that measures on a bare CUDA machine: a small vLLM, our wheel, our benchmarks.

    python benchmarks/gpu/bundle.py --base vllm.tar.xz    # a vLLM that was trimmed before
    python benchmarks/gpu/bundle.py --wheel vllm-0.32.0-....whl
    python benchmarks/gpu/bundle.py                       # downloads that wheel (500 MB)

The machine needs Python 3.12, torch 2.11 or later with CUDA, and a Hopper GPU; there:
`tar xf gkv-bundle.tar && gkv-bundle/run.sh`. What runs in it is all.py."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder's kernels.py would hide the package of that name
    sys.path[0] = str(Path(__file__).parents[1])

import machine
from gpu import fatbin

VLLM = "vllm==0.32.0"
PYTHON, PLATFORM, ARCHITECTURE = "3.12", "manylinux_2_28_x86_64", 90
NEEDED = (
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/_moe_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    "vllm/cumem_allocator.abi3.so",
    "vllm/fs_io_C.abi3.so",
    "vllm/spinloop.abi3.so",
)
"""Shared objects that a dense Qwen3 or Llama loads on Hopper. FlashAttention 2, FlashMLA, DeepGEMM
and the rest stay away, as does vLLM's Rust front end."""
LEFT_OUT = ("*.so", "*.so.*", "vllm/vllm-rs*", "*.data/*", "*.a", "*.cu", "*.cuh")
# What a machine with torch, transformers and their requirements lacks for vLLM 0.32.0; its own
# requirements would bring another torch. Remove the list when vLLM can be installed without.
REQUIREMENTS = (
    "openai==3.54.0",
    "apache-tvm-ffi==0.1.11",
    "llguidance==1.7.6",
    "oss-harmony==0.0.11",
    "pydantic-core==2.50.4",
    "xgrammar==0.2.8",
    "pyzmq==27.3.0",
    "pydantic==2.14.3",
    "compressed-tensors==0.17.0",
    "cbor2==6.3.0",
    "watchfiles==1.3.0",
    "fastapi==0.136.3",
    "msgspec==0.22.0",
    "httpx2==2.16.2",
    "model-hosting-container-standards==0.1.16",
    "uvicorn==0.54.0",
    "pybase64==1.5.1",
    "starlette==1.10.0",
    "loguru==0.7.3",
    "prometheus-fastapi-instrumentator==8.1.0",
    "cachetools==8.0.1",
    "jmespath==1.1.0",
    "typing-inspection==0.4.5",
    "annotated-types==0.8.0",
    "partial-json-parser==0.2.1.1.post7",
    "sniffio==1.3.1",
)
TESTS = (
    "pytest",
    "pytest-timeout",
    "pluggy",
    "iniconfig",
    "pygments",
    "hypothesis",
    "sortedcontainers",
)
"""What the suite runs with, in the versions that are installed here."""
SITE, WHEELS, SOURCE = "site.tar.xz", "wheels", "source.tar"

RUN = """#!/bin/sh
# Unpacks the bundle beside this script, once, and runs benchmarks/gpu/all.py with its arguments.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
if [ ! -e "$here/ready" ]; then
    "$python" - "$here" <<'END'
import sys, tarfile, zipfile
from pathlib import Path
here = Path(sys.argv[1])
for name, folder in (("site.tar.xz", "site"), ("source.tar", "source")):
    with tarfile.open(here / name) as packed:
        packed.extractall(here / folder, filter="data")
for wheel in sorted((here / "wheels").glob("*.whl")):
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(here / "site")
command = here / "bin" / "vllm"
command.parent.mkdir(exist_ok=True)
command.write_text(
    "#!/bin/sh\\nexec \\"${PYTHON:-python3}\\" -P -m vllm.entrypoints.cli.main \\"$@\\"\\n"
)
command.chmod(0o755)
END
    touch "$here/ready"
fi
export PYTHONPATH="$here/site${PYTHONPATH:+:$PYTHONPATH}" PATH="$here/bin:$PATH"
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
cd "$here/source"
exec "$python" benchmarks/gpu/all.py "$@"
"""


class BundleError(RuntimeError):
    """Says what is missing, or which command failed with what."""


# --- a small vLLM --------------------------------------------------------------------------------


def belongs(name: str) -> bool:
    """Whether a file of vLLM's wheel goes into the bundle."""
    return name in NEEDED or not any(fnmatch(name, pattern) for pattern in LEFT_OUT)


def trimmed(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """The files of vLLM's wheel that are needed, with the device code of one architecture.

    BundleError when one of `NEEDED` is not in it."""
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        if missing := [name for name in NEEDED if name not in names]:
            raise BundleError(f"{wheel.name} has no {', '.join(missing)}; is it {VLLM} for CUDA?")
        for name in names:
            if name.endswith("/") or not belongs(name):
                continue
            content = packed.read(name)
            yield name, fatbin.keep_only(content, ARCHITECTURE) if name in NEEDED else content


def contents(wheels: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """All files of these wheels, as an installation has them."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            for name in packed.namelist():
                if not name.endswith("/"):
                    yield name, packed.read(name)


def pack(files: Iterable[tuple[str, bytes]], target: Path) -> None:
    """A tar.xz of these files; zeroed device code is what makes it small."""
    with tarfile.open(target, "w:xz", preset=6) as packed:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            packed.addfile(entry, io.BytesIO(content))


def make_site(wheel: Path | None, target: Path, scratch: Path) -> None:
    """vLLM from its wheel, downloaded unless given, and what it needs beside torch."""
    if wheel is None:
        (wheel,) = download((VLLM,), scratch / "vllm")
    requirements = download(REQUIREMENTS, scratch / "requirements")

    def files() -> Iterator[tuple[str, bytes]]:
        yield from trimmed(wheel)
        yield from contents(requirements)

    pack(files(), target)


def check_site(path: Path) -> None:
    """BundleError unless a ready archive holds vLLM as it is pinned, with what it loads."""
    with tarfile.open(path) as packed:
        names = {name.removeprefix("./") for name in packed.getnames()}
    wanted = {*NEEDED, f"{VLLM.replace('==', '-')}.dist-info/METADATA"}
    if missing := sorted(wanted - names):
        raise BundleError(f"{path.name} has no {', '.join(missing)}")


# --- our part ------------------------------------------------------------------------------------


def download(requirements: tuple[str, ...], folder: Path) -> list[Path]:
    """The wheels for the machine's Python and platform, through pip."""
    wheel = ("--only-binary", ":all:", "--python-version", PYTHON, "--platform", PLATFORM)
    older = ("--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_17_x86_64")
    folder.mkdir(parents=True, exist_ok=True)
    _run(_pip("download", "--no-deps", *wheel, *older, "--dest", str(folder), *requirements))
    return sorted(folder.glob("*.whl"))


def build_wheel(folder: Path) -> Path:
    """Our own wheel, with the CUDA operators where nvcc is found."""
    cuda = "1" if shutil.which("nvcc") else "0"
    command = _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    _run([*command, str(machine.ROOT)], env={**os.environ, "GKV_BUILD_CUDA": cuda})
    (made,) = folder.glob("gkv_vllm-*.whl")
    with zipfile.ZipFile(made) as packed:
        if cuda == "1" and not any("_cuda" in n for n in packed.namelist() if n.endswith(".so")):
            raise BundleError("our wheel has no CUDA operators, although nvcc is here")
    return made


def make_source(target: Path) -> str:
    """The files that git knows, as they are in the working tree, and the commit they say they are.

    BundleError outside a git checkout."""
    commit = machine.commit()
    if commit is None:
        raise BundleError("a bundle is made from a git checkout, and this is none")
    listed = _run(["git", "-C", str(machine.ROOT), "ls-files", "-z"]).split("\0")
    with tarfile.open(target, "w") as packed:
        for name in sorted(filter(None, listed)):
            if (machine.ROOT / name).is_file() and not name.startswith("benchmarks/results/"):
                packed.add(machine.ROOT / name, name)
        note = tarfile.TarInfo("COMMIT")
        note.size = len(commit) + 1
        packed.addfile(note, io.BytesIO(f"{commit}\n".encode()))
        demo = machine.ROOT / "build" / "demo-model"
        if demo.is_dir():  # its tokenizer; making it takes transformers
            packed.add(demo, "build/demo-model")
    return commit


def installed_tests() -> tuple[str, ...]:
    """`TESTS`, pinned to what is installed here; what is not stays away."""
    return tuple(f"{name}=={v}" for name in TESTS if (v := machine.installed(name)))


def make(args: argparse.Namespace) -> Path:
    """The folder of the bundle, with everything in it."""
    folder = args.out / "gkv-bundle"
    shutil.rmtree(folder, ignore_errors=True)
    wheels, scratch = folder / WHEELS, args.out / "scratch"
    wheels.mkdir(parents=True)
    if args.base is not None:
        check_site(args.base)
        shutil.copy(args.base, folder / SITE)
        (folder / SITE).chmod(0o644)
    else:
        make_site(args.wheel, folder / SITE, scratch)
        check_site(folder / SITE)
    own = build_wheel(wheels)
    if not args.no_tests:
        download(installed_tests(), wheels)
    commit = make_source(folder / SOURCE)
    (folder / "run.sh").write_text(RUN)
    (folder / "run.sh").chmod(0o755)
    manifest = describe(folder, commit)
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{own.name} and {VLLM} for sm_{ARCHITECTURE}, commit {commit}")
    return folder


def describe(folder: Path, commit: str) -> dict[str, Any]:
    """What is in the bundle, by hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "commit": commit,
        "vllm": VLLM,
        "python": PYTHON,
        "architecture": f"sm_{ARCHITECTURE}",
        "sha256": {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        },
    }


def _pip(*words: str) -> list[str]:
    return [sys.executable, "-m", "pip", words[0], "--quiet", *words[1:]]


def _run(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise BundleError(f"{command[0]} {command[1:4]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ready = parser.add_mutually_exclusive_group()
    ready.add_argument("--base", type=Path, help="a tar.xz of vLLM and its requirements to use")
    ready.add_argument("--wheel", type=Path, help="vLLM's official CUDA wheel to trim")
    parser.add_argument("--no-tests", action="store_true", help="leave pytest out")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "build" / "gpu-bundle")
    args = parser.parse_args()
    try:
        folder = make(args)
    except (BundleError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    packed = args.out / "gkv-bundle.tar"
    with tarfile.open(packed, "w") as tar:
        tar.add(folder, folder.name)
    print(f"Wrote {packed} ({packed.stat().st_size / 2**20:.0f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
