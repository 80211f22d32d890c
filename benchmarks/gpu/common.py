# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What the GPU benchmarks share: model shapes, the device, clocks, and where results go.

Imports no Triton: `use` says first whether kernels are compiled or interpreted."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

RESULTS = machine.ROOT / "benchmarks" / "results"
SMOKE = machine.ROOT / "build" / "gpu-smoke"
"""Where smoke runs write: what they measure is nothing to keep."""
INTERPRETER = machine.ROOT / "tests" / "triton_cpu"
COMMIT_FILE = machine.ROOT / "COMMIT"
"""What a bundle says it was made from, where there is no git."""


Draw = Callable[[dict[str, Any], Path], None]
"""Makes a plot of a result, at a path."""


@dataclass(frozen=True)
class Model:
    """The shape of a decoder, and of its KV cache."""

    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    block_size: int = 16
    window: int = 16
    protected: int = 128
    """Tokens of a request that are never evicted."""
    interval: int = 128

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens in all layers, in 16-bit floats."""
        return tokens * self.layers * self.kv_heads * 2 * self.head_dim * 2

    def plane_bytes(self, tokens: int) -> int:
        """One float32 per token, layer and KV head."""
        return tokens * self.layers * self.kv_heads * 4


QWEN3_8B = Model(36, 8, 32, 128, 4096, 12288, 151936)
TINY = Model(2, 2, 4, 64, 64, 96, 512, window=4, protected=16, interval=16)
"""What Triton's interpreter gets through in seconds."""


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all GPU benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run with a tiny shape; measures nothing"
    )
    parser.add_argument("--out", type=Path, help="folder for JSON and plots")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw this result again")
    return parser


def use(args: argparse.Namespace, *, kernels: bool = True) -> Model:
    """Get ready for the device that was asked for; the model's shape to measure.

    kernels: whether this process runs some, which on a CPU are interpreted. Ends the process with a
    sentence where the device is not there, or would take for ever."""
    if args.device == "cpu":
        if not args.quick:
            sys.exit("--device cpu interprets the kernels, which takes for ever; add --quick")
        if kernels:  # before Triton is imported; its interpreter has no driver of its own
            os.environ["TRITON_INTERPRET"] = "1"
            sys.path.append(str(INTERPRETER))
        return TINY
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; --quick --device cpu runs the same code without numbers")
    return TINY if args.quick else QWEN3_8B


def device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name()


def folder_of(name: str) -> str:
    """`h200` for `NVIDIA H200`, `h100` for `NVIDIA H100 80GB HBM3`."""
    words = re.sub(r"^(nvidia|amd)\s+", "", name.lower()).split()
    return re.sub(r"[^a-z0-9]+", "-", words[0]).strip("-") if words else "unknown"


def out_folder(args: argparse.Namespace) -> Path:
    """Where this run writes: results of a device only if they were measured on it, in full."""
    if args.out is None:
        folder = SMOKE if args.quick else RESULTS / folder_of(device_name(args.device))
    else:
        folder = args.out.resolve()
        if args.quick and folder.is_relative_to(RESULTS):
            sys.exit(f"a smoke run measures nothing; choose a folder outside {RESULTS.name}/")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def describe(device: str) -> dict[str, Any]:
    """The machine, its device and the commit."""
    import torch

    facts = machine.describe()
    if facts["commit"] is None and COMMIT_FILE.exists():
        facts["commit"] = COMMIT_FILE.read_text().strip()
    facts |= {"device": device_name(device), "triton": machine.installed("triton")}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        facts["device_memory_gib"] = round(about.total_memory / 2**30, 1)
        facts["compute_capability"] = f"{about.major}.{about.minor}"
        facts["cuda"] = torch.version.cuda
    return facts


def write(
    path: Path, document: dict[str, Any], draw: Callable[[dict[str, Any], Path], None]
) -> None:
    """The numbers as JSON, and their plot beside it where matplotlib is there."""
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"Wrote {path}", flush=True)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(f"No matplotlib here, so no plot; draw it elsewhere with --draw {path.name}")
        return
    picture = path.with_suffix(".png")
    draw(document, picture)
    print(f"Wrote {picture}", flush=True)


def redraw(path: Path, draw: Draw) -> None:
    """The plot of numbers that were measured before."""
    draw(json.loads(path.read_text()), path.with_suffix(".png"))


class Clock:
    """Times calls on a device. Microseconds, medians, warm; data is never warm in the L2 cache."""

    FLUSHED_BYTES = 256 * 2**20
    """More than the L2 cache of any GPU."""
    SLEEP_CYCLES = 1_000_000
    """About half a millisecond, in which the host gets ahead of the device."""

    def __init__(self, device: str, seconds: float = 0.2) -> None:
        """seconds: about how long one measurement may take."""
        import torch

        self.torch = torch
        self.on_gpu = device == "cuda"
        self.seconds = seconds
        size = self.FLUSHED_BYTES if self.on_gpu else 0
        self.flushed = torch.empty(size, dtype=torch.int8, device=device)

    def wait(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()

    def on_device(self, call: Callable[[], Any]) -> float:
        """What the device takes for a call, without what the host takes to launch it.

        A call of many launches that takes the host longer than it takes the device is as slow as
        the host. On the CPU: `with_host`."""
        if not self.on_gpu:
            return self.with_host(call)
        self._timed(call)  # compiles
        first = self._timed(call)
        rounds = self._rounds(first)
        return statistics.median([first, *(self._timed(call) for _ in range(rounds))])

    def with_host(self, call: Callable[[], Any]) -> float:
        """What passes until a call is done, on the host and on the device."""
        call()
        first = self._waited(call)
        rounds = self._rounds(first)
        return statistics.median([first, *(self._waited(call) for _ in range(rounds))])

    def _rounds(self, microseconds: float) -> int:
        if not self.on_gpu:
            return 0
        return max(4, min(100, round(1e6 * self.seconds / max(microseconds, 1000.0))))

    def _timed(self, call: Callable[[], Any]) -> float:
        cuda = self.torch.cuda
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        self.flushed.zero_()
        cuda._sleep(self.SLEEP_CYCLES)
        start.record()
        call()
        end.record()
        cuda.synchronize()
        return 1000 * start.elapsed_time(end)

    def _waited(self, call: Callable[[], Any]) -> float:
        self.flushed.zero_()
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return 1e6 * (time.perf_counter() - start)


class Copies:
    """What copies on the device take, by how many bytes they read and write."""

    LARGEST = 2 * 2**30

    def __init__(self, clock: Clock, device: str, largest: int = LARGEST) -> None:
        import torch

        self.clock, self.largest = clock, largest
        self.source = torch.zeros(largest, dtype=torch.int8, device=device)
        self.target = torch.empty_like(self.source)
        self.known: dict[int, float] = {}

    def microseconds(self, traffic: int) -> float:
        """Of a copy that reads and writes `traffic` bytes in all; beyond the largest, as fast."""
        size = max(1, min(traffic // 2, self.largest))
        if size not in self.known:
            target, source = self.target[:size], self.source[:size]
            self.known[size] = self.clock.on_device(lambda: target.copy_(source))
        return self.known[size] * max(1.0, traffic / 2 / self.largest)

    @property
    def gigabytes_per_second(self) -> float:
        """Read and written, by the largest copy."""
        return 2 * self.largest / self.microseconds(2 * self.largest) / 1000
