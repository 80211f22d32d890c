# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Builds the compiled operators; all metadata stands in pyproject.toml.

For the CPU they need torch's headers and a C++20 compiler. Without, the package installs all the
same and runs the torch reference (`python -m gkv_vllm doctor` says so). One abi3 wheel for every
CPython from 3.11, on torch's stable ABI as of 2.11 (run on 2.13).

For CUDA they need nvcc. GKV_BUILD_CUDA=1 builds them or fails, =0 leaves them out; unset, they are
built beside a torch that has CUDA where nvcc is found (csrc/cuda/build.py does it)."""

import os
import shutil
import subprocess
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

TORCH_ABI = "0x020b000000000000"  # 2.11: what vLLM 0.32 runs on at least
PYTHON_ABI = "0x030b0000"
CUDA_OPS = "gkv_vllm.ops._cuda"


WITHOUT = {
    "gkv_vllm.ops._cpu": "gkv_vllm will run the torch reference, which is right but several times "
    "slower per eviction",
    CUDA_OPS: "gkv_vllm will do without its C++ operators for CUDA",
}


class BuildOps(build_ext):
    """A failed build is a warning where the extension is optional."""

    def build_extension(self, ext: Extension) -> None:
        build = self.build_cuda if ext.name == CUDA_OPS else super().build_extension
        try:
            build(ext)
        except Exception as error:
            if not ext.optional:
                raise
            print(
                f"warning: {ext.name} was not built ({error}); {WITHOUT[ext.name]}", file=sys.stderr
            )

    def build_cuda(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        subprocess.run([sys.executable, "csrc/cuda/build.py", "--output", output], check=True)


class StableWheel(bdist_wheel):
    """Any CPython from 3.11 on."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.distribution.ext_modules:
            self.py_limited_api = "cp311"


def cpu_ops() -> list[Extension]:
    found = find_spec("torch")
    if found is None or found.origin is None:
        print(
            "warning: torch is not here while gkv_vllm is built, so its C++ operators are left "
            "out; install with --no-build-isolation beside torch",
            file=sys.stderr,
        )
        return []
    torch = Path(found.origin).parent
    return [
        Extension(
            "gkv_vllm.ops._cpu",
            sorted(glob("csrc/cpu/*.cpp")),
            depends=sorted(glob("csrc/cpu/*.h")),
            define_macros=[("TORCH_TARGET_VERSION", TORCH_ABI), ("Py_LIMITED_API", PYTHON_ABI)],
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-isystem",
                str(torch / "include"),
            ],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            py_limited_api=True,
            optional=True,
            language="c++",
        )
    ]


def cuda_ops() -> list[Extension]:
    wanted = os.environ.get("GKV_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"GKV_BUILD_CUDA must be 0, 1 or unset, not '{wanted}'")
    if wanted == "0" or (not wanted and not (has_nvcc() and torch_has_cuda())):
        return []
    return [
        Extension(
            CUDA_OPS,
            sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu")),
            depends=sorted(glob("csrc/cuda/*.h")),
            py_limited_api=True,
            optional=not wanted,
        )
    ]


def has_nvcc() -> bool:
    home = os.environ.get("CUDA_HOME")
    return (Path(home) / "bin" / "nvcc").is_file() if home else shutil.which("nvcc") is not None


def torch_has_cuda() -> bool:
    found = find_spec("torch")
    if found is None or found.origin is None:
        return False
    return (Path(found.origin).parent / "lib" / "libtorch_cuda.so").is_file()


setup(
    ext_modules=cpu_ops() + cuda_ops(), cmdclass={"build_ext": BuildOps, "bdist_wheel": StableWheel}
)
