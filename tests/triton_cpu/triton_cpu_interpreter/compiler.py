# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The compiler that Triton asks every backend for; it refuses to compile."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget, Language


class InterpretedOnly(BaseBackend):
    """Accepts the target "cpu" and fails when a kernel reaches it."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "cpu-interpreter"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise RuntimeError("a Triton kernel was to be compiled for the CPU; set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: object, language: Language) -> None:
        raise RuntimeError("a Triton kernel was to be compiled for the CPU; set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        """There is nothing to load."""

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}
