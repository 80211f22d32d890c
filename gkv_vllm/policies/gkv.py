# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The G-KV policy: global importance, the maximum of the decayed past score and the present one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gkv_vllm.policies.base import LayerView, Policy
from gkv_vllm.policies.registry import register_policy

if TYPE_CHECKING:
    from torch import Tensor


@register_policy("gkv")
@dataclass(frozen=True)
class GKV(Policy):
    """G-KV (arXiv 2512.00504, section 3) at block granularity, without the redundancy term.

    Per layer and KV head: S = mean over the window's queries of the maximum over the query group
    of softmax attention, window columns dropped; S <- S / max S; a block scores its best token;
    F = max(alpha * F_prev, S). `combine` turns F into one number per block: the `mean` or
    `max` over layers and heads, or the mean `rank` (each layer and head votes with an order)."""

    alpha: float = 0.8
    combine_by: str = "mean"

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie between 0 and 1, got {self.alpha}")
        if self.combine_by not in ("mean", "max", "rank"):
            raise ValueError(f"combine_by must be mean, max or rank, got '{self.combine_by}'")

    def score(self, view: LayerView) -> Tensor:
        from gkv_vllm.ops import reference as ops

        local = ops.local_scores(view.queries, view.keys, view.scale, view.softcap)
        present = ops.block_max(ops.normalise(local), view.block_size, view.history.shape[-1])
        return ops.decayed_max(view.history, present, self.alpha)

    def combine(self, scores: Tensor) -> Tensor:
        from gkv_vllm.ops import reference as ops

        return ops.combine(scores, self.combine_by)
