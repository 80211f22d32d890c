# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The key norm policy: keys of small norm attract attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gkv_vllm.policies.base import Policy
from gkv_vllm.policies.registry import register_policy

if TYPE_CHECKING:
    from torch import Tensor

    from gkv_vllm.policies.view import View


@register_policy("knorm")
@dataclass(frozen=True)
class KNorm(Policy):
    """Keeps the keys with the smallest L2 norm (arXiv 2406.11430).

    score = -||k||; a block scores the mean of its tokens."""

    def score(self, view: View) -> Tensor:
        return view.units(-view.key_norms(), by="mean")
