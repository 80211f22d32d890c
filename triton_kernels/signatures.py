# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""With which argument types and constants a kernel is launched, so that it can be compiled offline.

Every kernel file exports `SIGNATURES`; `compile.py` compiles them without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Signature:
    """One specialisation of one kernel."""

    kernel: Any
    """What `triton.jit` made of the function."""
    name: str
    """Which specialisation, in words: `bf16 d128`."""
    signature: Mapping[str, str]
    """The type of each run-time argument, as Triton spells it: `*bf16`, `i32`, `fp32`."""
    constexprs: Mapping[str, Any]
    """All others: constexpr parameters, pointers that are None, and strides that are 1."""
    divisible_by_16: tuple[str, ...] = ()
    """Run-time arguments that the launcher's callers always pass so: Triton specialises on it."""
    num_warps: int = 4
    num_stages: int = 3
    hot: bool = True
    """Whether it must not spill registers."""
