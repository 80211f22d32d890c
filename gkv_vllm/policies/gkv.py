# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The G-KV policy: global importance, the maximum of the decayed past score and the present one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from gkv_vllm.ops import reference as ops
from gkv_vllm.policies.base import GlobalScore, Needs, Policy
from gkv_vllm.policies.random import draw
from gkv_vllm.policies.registry import register_policy

if TYPE_CHECKING:
    from torch import Tensor

    from gkv_vllm.policies.view import View

RANDOM_SEED = 0
DRAWN = 1e6
"""Added to the score of a unit that a draw keeps: more than any score or sum of scores."""
FIRST_POOL = 5
"""Zipage pools the scores of a request's first eviction over so many tokens."""


@dataclass(frozen=True)
class Variant:
    """What sources of the same idea disagree on."""

    score_weight: float
    temperature: float
    redundancy: str
    normalised: bool
    pools_first: bool
    history: str = "max"
    span: int = 1


VARIANTS = {
    "paper": Variant(0.5, 1.0, "exact", normalised=True, pools_first=False),
    "zipage": Variant(0.2, 0.4, "block", normalised=False, pools_first=True),
    "spans": Variant(0.1, 1.0, "exact", normalised=True, pools_first=False, history="sum", span=9),
}


@register_policy("gkv")
@dataclass(frozen=True)
class GKV(Policy):
    """Keeps what was ever important and is not said twice: decayed maximum of attention scores.

    G-KV (arXiv 2512.00504, section 3), per layer and KV head:

        S = mean over the window of max over the query group of softmax attention; S <- S / max S
        F = max(alpha F_past, S)          (history: `max`; `mean`, `sum` are the paper's ablations)
        Z = score_weight F - (1 - score_weight) R / max R

    R is how much a key resembles the others (`View.redundancy`); the maxima are over the tokens
    older than the window. With block granularity S is the best token of a block, before the history
    (so F is the tokens' own history, max-pooled), and R the mean of a block's tokens.

    `variant="zipage"` (arXiv 2603.08743): weight 0.2, R among the keys of each cache block alone
    with softmax temperature 0.4, nothing divided by its maximum; at a request's first eviction F is
    max-pooled over 5 tokens in Z, but not in the history. (There, tokens of the window have scores
    as well; here none before they are older than a window.)

    `variant="spans"` is ours: weight 0.1, history `sum`, and a token is worth what it is worth
    itself or what its neighbours are worth on average, whichever is more (`span` of 9):

        Z <- max(Z, mean of Z over the `span` tokens around it that are still there)

    so that a passage of which a part is worth keeping stays whole. Whole blocks are passages
    already, and are left as they are. `history`, `score_weight`, `temperature`, `redundancy` and
    `span` follow the variant unless given. `combine_by` is how layers and heads agree where they
    share a kept set.

    `restated`, a cosine, is ours, too; below 1 (say 0.8) what was said again later as a whole
    passage counts less:

        Z <- Z - (1 - score_weight) W, W the least over a token and its two neighbours of
        max(0, C - restated) / (1 - restated), C a key's largest cosine to a newer one

    (`View.restated`), before `span` lifts what is around it. Neighbours are those that the head
    still holds, the protected ones not counted; W of a block is the mean of its tokens'. Without
    redundancy (`none`) Z is F, less (1 - score_weight) W all the same.

    Three more options of ours. `redundancy="superseded"` makes R the largest cosine to a newer
    key, as it is (`View.superseded`): what is said again later goes first. `value_power` p weighs F
    by (||v|| / mean ||v||)^p before Z, and divides by the maximum again: what a token adds to the
    output is its attention times its value. (Of a block it takes the largest F and the largest
    norm, which may be two tokens'.) `random_share` gives that share of what is kept to a draw among
    the candidates, by their order, new at each event."""

    variant: Literal["paper", "zipage", "spans"] = "paper"
    alpha: float = 0.8
    history: Literal["max", "mean", "sum"] | None = None
    score_weight: float | None = None
    temperature: float | None = None
    redundancy: Literal["exact", "block", "superseded", "none"] | None = None
    combine_by: Literal["mean", "max", "rank"] = "mean"
    span: int | None = None
    restated: float = 1.0
    value_power: float = 0.0
    random_share: float = 0.0

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Only a draw needs the key, which costs a pass over the prompt of each request."""
        return Needs(queries=True, history=True, seeded=self.random_share > 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "score_weight", "restated", "random_share"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")
        if self.restated < 1.0 and not VARIANTS[self.variant].normalised:
            raise ValueError(
                f"restated does not go with variant {self.variant!r}, whose scores are not "
                "normalised: it would outweigh them; leave one out"
            )
        if not 0 <= self.value_power < math.inf:
            raise ValueError(f"value_power must be 0 or more and finite, got {self.value_power}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        ops.check_kernel(self.span, "span")

    def _setting(self, name: str) -> Any:
        """A parameter, or what the variant has in its place."""
        value = getattr(self, name)
        return getattr(VARIANTS[self.variant], name) if value is None else value

    def update(self, view: View) -> Tensor:
        local = view.local_scores("max_probability")
        if VARIANTS[self.variant].normalised:
            local = ops.normalise(local)
        present, past = view.units(local), view.history
        assert past is not None
        history = self._setting("history")
        if history == "max":
            return torch.maximum(self.alpha * past, present)
        if history == "sum":
            return self.alpha * past + present
        return self.alpha * torch.where(view.is_new(), present, past) + (1 - self.alpha) * present

    def score(self, view: View) -> Tensor:
        scores = ops.lift(self._scores(view), self._setting("span"), view.unit)
        count = round(self.random_share * view.keep)
        if not count:
            return scores
        drawn = draw(view, RANDOM_SEED, (view.num_units,)).topk(min(count, view.num_units))
        bonus = torch.zeros(view.num_units).index_fill(0, drawn.indices, DRAWN)
        return scores + bonus.to(scores.device)  # a new tensor: these may be the history itself

    def _scores(self, view: View) -> Tensor:
        scores, weight = self._mixed(view), self._setting("score_weight")
        if self.restated == 1.0 or weight == 1.0:
            return scores
        again = view.units(view.restated(self.restated), by="mean")
        return scores - (1 - weight) * again

    def _mixed(self, view: View) -> Tensor:
        weight, kind = self._setting("score_weight"), self._setting("redundancy")
        importance = self._importance(view)
        if self.value_power:
            norms = view.value_norms()
            weights = (norms / norms.mean(-1, keepdim=True)) ** self.value_power
            importance = ops.normalise(importance * view.units(weights))
        if kind == "none" or weight == 1.0:
            return importance
        if kind == "superseded":
            return weight * importance - (1 - weight) * view.units(view.superseded(), by="mean")
        redundancy = view.redundancy(
            temperature=self._setting("temperature"), within_blocks=kind == "block"
        )
        if VARIANTS[self.variant].normalised:
            redundancy = ops.normalise(redundancy)
        return weight * importance - (1 - weight) * view.units(redundancy, by="mean")

    def global_score(self) -> GlobalScore | None:
        variant = VARIANTS[self.variant]
        if self.value_power or self.random_share or self._setting("redundancy") == "superseded":
            return None
        if self._setting("history") == "mean":
            return None
        if not variant.normalised or variant.pools_first:
            return None
        return GlobalScore(
            alpha=self.alpha,
            score_weight=self._setting("score_weight"),
            temperature=self._setting("temperature"),
            redundancy=self._setting("redundancy"),
            history=self._setting("history"),
            span=self._setting("span"),
            restated=self.restated,
        )

    def _importance(self, view: View) -> Tensor:
        """F; pooled at Zipage's first eviction, where nothing has a past and F is S."""
        if VARIANTS[self.variant].pools_first and view.event == 0:
            return view.units(ops.max_pool(view.local_scores("max_probability"), FIRST_POOL))
        assert view.history is not None
        return view.history

    def combine(self, scores: Tensor) -> Tensor:
        return ops.combine(scores, self.combine_by)

    @property
    def combine_ranks(self) -> Literal["mean", "max"]:
        return "max" if self.combine_by == "max" else "mean"
