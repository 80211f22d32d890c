# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The driver of a device that has no streams, no cache to flush and no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import Benchmarker, DriverBase


class CpuDriver(DriverBase):
    """What Triton and vLLM ask of a driver before the interpreter takes over."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise RuntimeError(f"no launcher is compiled for the CPU, and none has arguments of {ty}")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Benchmarker:
        return take_no_time


def take_no_time(
    kernel_call: Callable[[], object], *, quantiles: Sequence[float], **kwargs: Any
) -> list[float]:
    """All configurations are equally fast, so that autotuning takes the first and runs none."""
    return [0.0] * len(quantiles)
