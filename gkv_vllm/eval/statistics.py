# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Paired comparison of two cells: bootstrap intervals and a sign-flip test; reads no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Share:
    """Mean over texts of the share of right answers, with a bootstrap interval over texts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """How much better the first is than the second on the same prompts and seeds."""

    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    ties: int
    losses: int


def share(accuracies: Sequence[float], seed: int = 0) -> Share:
    """The mean of one number per text; texts are drawn again with replacement for the interval."""
    each = np.asarray(accuracies, float)
    if not len(each):
        return Share(float("nan"), float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(0, len(each), (RESAMPLES, len(each)))
    low, high = np.quantile(each[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Share(float(each.mean()), float(low), float(high))


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Compare one number per text, paired by position. ValueError unless both have as many.

    The p-value is that of a two-sided sign-flip test: the share of random signs under which the
    mean difference is at least as large, the observed one counted too."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired numbers must be two equal lists, got {a.shape} and {b.shape}")
    delta = a - b
    rng = np.random.default_rng(seed)
    drawn = delta[rng.integers(0, len(delta), (RESAMPLES, len(delta)))].mean(1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    flipped = (rng.choice([-1.0, 1.0], (RESAMPLES, len(delta))) * delta).mean(1)
    # Sums of the same numbers in another order differ by rounding.
    as_large = np.abs(flipped) >= abs(delta.mean()) - 1e-12
    return Comparison(
        difference=float(delta.mean()),
        low=float(low),
        high=float(high),
        p_value=float((as_large.sum() + 1) / (RESAMPLES + 1)),
        wins=int((delta > 0).sum()),
        ties=int((delta == 0).sum()),
        losses=int((delta < 0).sum()),
    )


def ratio(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Share:
    """Mean of the first over mean of the second, texts drawn again in pairs for the interval.

    NaN throughout where the second's mean is 0. ValueError unless both have as many."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired numbers must be two equal lists, got {a.shape} and {b.shape}")
    if not len(b) or not b.mean():
        return Share(float("nan"), float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(0, len(b), (RESAMPLES, len(b)))
    of = b[drawn].mean(1)
    low, high = np.quantile(
        a[drawn].mean(1)[of > 0] / of[of > 0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    )
    return Share(float(a.mean() / b.mean()), float(low), float(high))


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which of several tests are significant together (Holm's step-down at the 5 % level)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found, alive = [False] * len(p_values), True
    for rank, i in enumerate(order):
        alive = alive and p_values[i] < (1 - LEVEL) / (len(p_values) - rank)
        found[i] = alive
    return found


def per_text(predictions: Sequence[dict[str, Any]], far: bool = False) -> dict[int, float]:
    """Accuracy of each text by its seed; a text without answers has none right.

    `far`: of the far answers alone, and only texts that have any."""
    right, answers = ("right_far", "answers_far") if far else ("right", "answers")
    return {
        p["seed"]: p[right] / p[answers] if p[answers] else 0.0
        for p in predictions
        if p[answers] or not far
    }
