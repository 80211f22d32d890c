# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The null policy that forgets at random; any score has to beat it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gkv_vllm.policies.base import Policy, RankView
from gkv_vllm.policies.registry import register_policy


@register_policy("random")
@dataclass(frozen=True)
class Random(Policy):
    """Keeps what is protected and a uniform draw of the rest (arXiv 2609.03430).

    The draw depends on the seed, the request and the number of its evictions, and on nothing
    else: the same request loses the same blocks in whatever company it runs."""

    needs_queries: ClassVar[bool] = False

    seed: int = 0

    def rank(self, view: RankView) -> Sequence[float]:
        draw = random.Random(f"{self.seed}:{view.key}:{view.event}")
        return [draw.random() for _ in view.blocks]
