# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The H2O policy: heavy hitters by the attention of every query so far, and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gkv_vllm.policies.base import Needs, Policy
from gkv_vllm.policies.registry import register_policy

if TYPE_CHECKING:
    from torch import Tensor

    from gkv_vllm.policies.view import View


@register_policy("h2o")
@dataclass(frozen=True)
class H2O(Policy):
    """Keeps the tokens that got most attention in total, and as many recent ones.

    H2O (arXiv 2306.14048): score = sum over all queries since the token was computed, those of the
    prompt included, and over the query group, of softmax attention. It is accumulated exactly, in
    every step, beside the attention kernel: a second pass over the keys. Of the tokens that stay,
    protected ones apart, `recent_ratio` are the newest whatever they score (the paper's half), the
    window among them; a block scores the sum of its tokens. Unlike the "H2O" of G-KV's repository
    nothing decays and no query is left out (that one is `gkv` with history `sum`, window 1)."""

    needs: ClassVar[Needs] = Needs(attention_mass=True)

    recent_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.recent_ratio <= 1.0:
            raise ValueError(f"recent_ratio must lie between 0 and 1, got {self.recent_ratio}")

    def score(self, view: View) -> Tensor:
        mass = view.units(view.attention_mass(), by="sum")
        newest = view.live_tokens - view.protected - view.num_candidates  # these never compete
        recent = int(self.recent_ratio * (view.keep * view.unit + newest)) - newest
        mass[..., view.num_units - recent // view.unit :] = mass.amax(-1, keepdim=True) + 1
        return mass
