# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The R-KV policy: present attention, minus what other keys say already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from gkv_vllm.ops import reference as ops
from gkv_vllm.policies.base import Needs, Policy
from gkv_vllm.policies.registry import register_policy

if TYPE_CHECKING:
    from torch import Tensor

    from gkv_vllm.policies.view import View

# Form of the local score, max-pool kernel, weight of the score.
VARIANTS = {"original": ("max_logit", 7, 0.07), "gkv": ("max_probability", 5, 0.1)}


@register_policy("rkv")
@dataclass(frozen=True)
class RKV(Policy):
    """Keeps what the window attends to and no other key resembles.

    R-KV (arXiv 2505.24133): Z = score_weight * maxpool(S) - (1 - score_weight) * R, S the local
    score of the window, R the redundancy (`View.redundancy`). Its repository takes the maximum over
    the query group on logits and a softmax over the older tokens (`original`, kernel 7, weight
    0.07, there with a window of 8); G-KV's repository, for its comparison, the maximum over
    probabilities (`gkv`, kernel 5, weight 0.1, window 16). Blocks take the best S and the mean R of
    their tokens. `kernel` and `score_weight` follow the variant unless given."""

    needs: ClassVar[Needs] = Needs(queries=True)

    variant: Literal["original", "gkv"] = "original"
    score_weight: float | None = None
    kernel: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_weight is not None and not 0.0 <= self.score_weight <= 1.0:
            raise ValueError(f"score_weight must lie between 0 and 1, got {self.score_weight}")
        ops.check_kernel(self.kernel)

    def score(self, view: View) -> Tensor:
        form, kernel, weight = VARIANTS[self.variant]
        weight = weight if self.score_weight is None else self.score_weight
        kernel = kernel if self.kernel is None else self.kernel
        attention = view.units(ops.max_pool(view.local_scores(form), kernel))
        if weight == 1.0:
            return attention
        return weight * attention - (1 - weight) * view.units(view.redundancy(), by="mean")
