# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Builds the C++ operators for CPU; all metadata stands in pyproject.toml.

They need torch's headers and a C++20 compiler. Without, the package installs all the same and runs
the torch reference (`python -m gkv_vllm doctor` says so). One abi3 wheel for every CPython from
3.11, on torch's stable ABI as of 2.11 (run on 2.13)."""

import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

TORCH_ABI = "0x020b000000000000"  # 2.11: what vLLM 0.32 runs on at least
PYTHON_ABI = "0x030b0000"


class BuildOps(build_ext):
    """A failed build is a warning: the extension is optional."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            print(
                f"warning: {ext.name} was not built ({error}); gkv_vllm will run the torch "
                "reference, which is right but several times slower per eviction",
                file=sys.stderr,
            )


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


setup(ext_modules=cpu_ops(), cmdclass={"build_ext": BuildOps, "bdist_wheel": StableWheel})
