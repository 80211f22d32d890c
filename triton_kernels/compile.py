# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Compiles every kernel for a GPU that need not be there, and says what each takes of it.

    python -m gkv_vllm.triton_kernels.compile --json FILE [--target cuda:90 cuda:100]

Triton's package brings all tools, so this runs on any machine. What was found is recorded in
benchmarks/results/sm90/triton.json."""

from __future__ import annotations

import argparse
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .signatures import Signature

PACKAGE = __package__ or "gkv_vllm.triton_kernels"
NOT_KERNELS = ("compile", "signatures")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one program of a kernel takes of a multiprocessor."""

    registers: int
    """Per thread."""
    spills: int
    """Bytes of local memory per thread. A kernel has no arrays, so registers were not enough."""
    shared: int
    """Bytes of shared memory."""
    threads: int


def compile_signature(signature: Signature, target: str = "cuda:90") -> Resources:
    """Compile one specialisation for `cuda:<capability>` and read what the binary says of itself.

    ValueError where the signature does not name all arguments, or where kernels are interpreted;
    whatever Triton raises where it does not compile."""
    compiled = compile_kernel(signature, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not say what the kernel uses: {usage}")
    registers, stack, local = map(int, found.groups())
    return Resources(
        registers=registers,
        spills=stack + local,
        shared=compiled.metadata.shared,
        threads=32 * signature.num_warps,
    )


def compile_kernel(signature: Signature, target: str = "cuda:90") -> CompiledKernel:
    """What Triton makes of one specialisation: `asm["ptx"]`, `asm["cubin"]` and more."""
    kernel, types, constants = signature.kernel, signature.signature, signature.constexprs
    label = f"{kernel.__name__} ({signature.name})"
    if triton.knobs.runtime.interpret:
        raise ValueError(f"{label}: kernels are interpreted; unset TRITON_INTERPRET")
    names = kernel.arg_names
    if set(names) != set(types) | set(constants) or set(types) & set(constants):
        raise ValueError(
            f"{label}: signature and constexprs must name each of {names} once, "
            f"got {sorted(types)} and {sorted(constants)}"
        )
    if not set(signature.divisible_by_16) <= set(types):
        raise ValueError(f"{label}: divisible_by_16 must name run-time arguments")
    backend, _, capability = target.partition(":")
    if backend != "cuda" or not capability.isdigit():
        raise ValueError(f"target must be cuda:<capability>, got {target}")
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=dict(constants),
        attrs={
            (names.index(name),): [["tt.divisibility", 16]] for name in signature.divisible_by_16
        },
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", int(capability), 32),
        options={"num_warps": signature.num_warps, "num_stages": signature.num_stages},
    )


def signatures() -> Iterator[tuple[str, Signature]]:
    """All specialisations that the kernel files name, with the file's name."""
    for module in pkgutil.iter_modules(import_module(PACKAGE).__path__):
        if module.name not in NOT_KERNELS:
            found = getattr(import_module(f"{PACKAGE}.{module.name}"), "SIGNATURES", ())
            yield from ((module.name, signature) for signature in found)


def table(targets: list[str]) -> dict[str, Any]:
    """What each kernel takes, as JSON; raises for the first that does not compile."""
    rows = []
    for target in targets:
        for file, signature in signatures():
            rows.append(
                {
                    "target": target,
                    "file": file,
                    "kernel": signature.kernel.__name__,
                    "name": signature.name,
                    "hot": signature.hot,
                    **asdict(compile_signature(signature, target)),
                }
            )
    return {"triton": triton.__version__, "kernels": rows}


def main(arguments: list[str] | None = None) -> int:
    """Write the table; 1 if a hot kernel spills."""
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}.compile", description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the table; without: print it")
    parser.add_argument("--target", nargs="+", default=["cuda:90"])
    options = parser.parse_args(arguments)
    result = table(options.target)
    lines = ",\n".join(map(json.dumps, result["kernels"]))
    text = f'{{"triton": "{result["triton"]}", "kernels": [\n{lines}\n]}}\n'
    if options.json is None:
        print(text, end="")
    else:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)
    spilling = [row for row in result["kernels"] if row["hot"] and row["spills"]]
    for row in spilling:
        print(f"{row['kernel']} ({row['name']}) spills {row['spills']} bytes", file=sys.stderr)
    return bool(spilling)


if __name__ == "__main__":
    sys.exit(main())
