# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The null policy that forgets the oldest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gkv_vllm.policies.base import Policy
from gkv_vllm.policies.registry import register_policy

if TYPE_CHECKING:
    from torch import Tensor

    from gkv_vllm.policies.view import View


@register_policy("recency")
@dataclass(frozen=True)
class Recency(Policy):
    """Keeps what is protected and the newest of the rest: score = position."""

    def score(self, view: View) -> Tensor:
        return view.order()
