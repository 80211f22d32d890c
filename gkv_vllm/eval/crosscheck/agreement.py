# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""How far two kept sets agree, head by head, and why not further; knows no policy and no press."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from gkv_vllm.ops.topk import topk_keep

CAUSES = ("none", "newest", "ties", "rounding", "unexplained")


ROUNDING = 1e-4
"""Scores that are further apart than this, over the largest of the head, are not rounded: wrong."""


@dataclass(frozen=True)
class Head:
    """One layer and KV head of one prompt."""

    jaccard: float
    cause: str
    """Of the disagreement: `none` where there is none; `newest` where one side alone may evict the
    newest tokens; `ties` where the other's scores are equal, and we prefer the newer token;
    `rounding` where scores at the boundary are as close as the two sides' numbers of one token are
    apart; `unexplained`."""
    gap: float = 0.0
    """The most by which the other side's scores prefer its choice, over the largest score; what
    `newest` explains is left aside."""
    score_difference: float | None = None
    """Largest, over the largest score of the head; None where scores are not comparable."""


def compare(
    ours: Tensor, theirs: Tensor, candidates: int, their_scores: Tensor, our_scores: Tensor | None
) -> Head:
    """Of one head. ours and theirs: positions [kept], equally many; their_scores [tokens].

    Tokens from `candidates` on, the newest, never compete with us. our_scores [candidates] are
    None where the two sides order tokens by numbers of different kinds."""
    tokens = len(their_scores)
    mine, other = _mask(ours, tokens), _mask(theirs, tokens)
    scale = float(their_scores[:candidates].abs().max())
    apart = 0.0
    if our_scores is not None:
        apart = float((our_scores - their_scores[:candidates]).abs().max())
    difference = None if our_scores is None else apart / scale
    jaccard = float((mine & other).sum() / (mine | other).sum())
    if torch.equal(mine, other):
        return Head(jaccard, "none", score_difference=difference)
    # What their scores would keep if the newest tokens could not go.
    by_our_rule = torch.ones(tokens, dtype=torch.bool)
    by_our_rule[:candidates] = False
    by_our_rule[topk_keep(their_scores[:candidates], len(ours) - (tokens - candidates))] = True
    left_out, put_in = by_our_rule & ~mine, mine & ~by_our_rule
    if not left_out.any():
        cause = "ties" if other[candidates:].all() else "newest"
        return Head(jaccard, cause, score_difference=difference)
    gap = float(their_scores[left_out].max() - their_scores[put_in].min())
    # Each side's number of either token may be off by `apart`.
    rounded = gap <= 2 * apart and apart <= ROUNDING * scale
    return Head(jaccard, "rounding" if rounded else "unexplained", gap / scale, difference)


def _mask(positions: Tensor, tokens: int) -> Tensor:
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[positions] = True
    if int(mask.sum()) != len(positions):
        raise ValueError("a kept set names a position twice")
    return mask


@dataclass(frozen=True)
class Agreement:
    """Over all heads of all prompts of one row of the report."""

    heads: int
    equal: float
    """Share of heads whose sets are the same."""
    jaccard_mean: float
    jaccard_least: float
    score_difference: float | None
    gap: float
    causes: dict[str, int]
    by_head: list[list[float]]
    """Share of equal sets by layer and KV head."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def summarise(prompts: Sequence[Sequence[Sequence[Head]]]) -> Agreement:
    """Of heads [prompts][layers][kv_heads]."""
    heads = [head for prompt in prompts for layer in prompt for head in layer]
    differences = [h.score_difference for h in heads if h.score_difference is not None]
    equal = torch.tensor([[[h.cause == "none" for h in layer] for layer in p] for p in prompts])
    return Agreement(
        heads=len(heads),
        equal=float(equal.float().mean()),
        jaccard_mean=sum(head.jaccard for head in heads) / len(heads),
        jaccard_least=min(head.jaccard for head in heads),
        score_difference=max(differences) if differences else None,
        gap=max(head.gap for head in heads),
        causes={cause: sum(head.cause == cause for head in heads) for cause in CAUSES},
        by_head=equal.float().mean(0).tolist(),
    )
