# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The SnapKV policy at decode time: what the present window attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from gkv_vllm.ops import reference as ops
from gkv_vllm.policies.base import Needs, Policy
from gkv_vllm.policies.registry import register_policy

if TYPE_CHECKING:
    from torch import Tensor

    from gkv_vllm.policies.view import View

# Form of the local score, pooling, kernel.
VARIANTS = {
    "original": ("max_logit", ops.max_pool, 7),
    "gkv": ("max_probability", ops.max_pool, 5),
    "kvpress": ("mean_probability", ops.average_pool, 5),
}


@register_policy("snapkv")
@dataclass(frozen=True)
class SnapKV(Policy):
    """Keeps what the window attends to, with its neighbours: score = pool(S).

    SnapKV (arXiv 2404.14469), applied at every eviction. Sources differ: the repository of R-KV
    takes the maximum over the query group on logits and pools 7 tokens by maximum (`original`,
    there with a window of 8), that of G-KV the maximum over probabilities, 5 tokens (`gkv`, window
    16), kvpress the means over the group and over 5 tokens (`kvpress`, window 64). A block scores
    its best token. `kernel` follows the variant unless given."""

    needs: ClassVar[Needs] = Needs(queries=True)

    variant: Literal["original", "gkv", "kvpress"] = "original"
    kernel: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_kernel(self.kernel)

    def score(self, view: View) -> Tensor:
        form, pool, kernel = VARIANTS[self.variant]
        kernel = kernel if self.kernel is None else self.kernel
        return view.units(pool(view.local_scores(form), kernel))
