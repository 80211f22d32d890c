# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Captures a call once: as a CUDA graph, or as what a graph keeps of it where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch


def captured(call: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What replays the kernels of a call. The call itself leaves no trace; it reads nothing back.

    On a GPU it runs once before it is captured, since Triton compiles its kernels then."""
    if device.type == "cpu":
        return _taped(call)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _taped(call: Callable[[], None]) -> Callable[[], None]:
    """The launches of a call in Triton's interpreter: same kernels, tensors, numbers and grids.

    Work of torch itself is not on the tape, and so is missed when it is replayed."""
    from triton.runtime.interpreter import InterpretedFunction

    launch, tape = InterpretedFunction.run, []

    def record(kernel: Any, *args: Any, **kwargs: Any) -> None:
        tape.append(partial(launch, kernel, *args, **kwargs))

    with mock.patch.object(InterpretedFunction, "run", record):
        call()
    if not tape:
        raise RuntimeError("no kernel was launched")

    def replay() -> None:
        for launched in tape:
            launched()

    return replay
