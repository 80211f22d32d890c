# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The null policy that forgets the oldest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gkv_vllm.policies.base import Policy, RankView
from gkv_vllm.policies.registry import register_policy


@register_policy("recency")
@dataclass(frozen=True)
class Recency(Policy):
    """Keeps what is protected and the newest blocks: score = position.

    With `protect=sinks` this is StreamingLLM (arXiv 2309.17453) in whole blocks."""

    needs_queries: ClassVar[bool] = False

    def rank(self, view: RankView) -> Sequence[float]:
        return [float(block) for block in view.blocks]
