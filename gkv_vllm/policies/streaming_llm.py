# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The StreamingLLM policy: attention sinks and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gkv_vllm.policies.base import Policy
from gkv_vllm.policies.registry import register_policy

if TYPE_CHECKING:
    from torch import Tensor

    from gkv_vllm.policies.view import View


@register_policy("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keeps the first `sinks` tokens of the sequence and the newest of the rest.

    StreamingLLM (arXiv 2309.17453): score = position, the sinks above all. Sinks that `protect`
    covers count: with protect=prompt the prompt holds them. A block with a sink is one."""

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    def score(self, view: View) -> Tensor:
        order = view.order()
        unprotected_sinks = max(0, self.sinks - view.protected)
        order[..., : -(-unprotected_sinks // view.unit)] += view.num_units
        return order
