# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Lists what is measured: tables of policies, forms and budgets; measures nothing itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LENGTH = 760
WINDOW, INTERVAL = 16, 32
BUDGET, OTHER_BUDGETS = 160, (96, 256)
FAR = 128
"""A question is far if the value was last seen more than so many tokens ago."""

FORMS: dict[str, dict[str, Any]] = {
    "token/head": {"granularity": "token", "scope": "head"},
    "token/layer": {"granularity": "token", "scope": "layer"},
    "token/all": {"granularity": "token", "scope": "all"},
    "block": {"granularity": "block"},
}
POLICIES: dict[str, dict[str, Any]] = {
    "gkv": {"policy": "gkv"},
    "gkv, zipage": {"policy": "gkv", "policy_config": {"variant": "zipage"}},
    "gkv, no redundancy": {"policy": "gkv", "policy_config": {"redundancy": "none"}},
    "rkv": {"policy": "rkv"},
    "snapkv": {"policy": "snapkv"},
    "h2o": {"policy": "h2o"},
    "knorm": {"policy": "knorm"},
    "streaming_llm": {"policy": "streaming_llm"},
    "recency": {"policy": "recency"},
    "random": {"policy": "random"},
}
FEW_FORMS = {"streaming_llm", "recency", "h2o"}
"""Measured per head and in blocks alone: every scope gives the first two the same tokens, and the
reference form of h2o, which reads all keys in every step, is slow."""
MANY_FORMS = {"gkv", "gkv, no redundancy", "rkv"}
"""Measured in three forms in the side tables, the others in two."""


@dataclass(frozen=True)
class Setting:
    """One engine. `policy` None: nothing is evicted."""

    table: str
    label: str
    form: str = ""
    budget: int = BUDGET
    seed: int = 0
    """Which of the trained models."""
    own_answers: bool = False
    policy: dict[str, Any] | None = field(default=None)

    @property
    def kv_policy(self) -> dict[str, Any] | None:
        if self.policy is None:
            return None
        return {
            "budget": self.budget,
            "interval": INTERVAL,
            "window": WINDOW,
            "protect": "none",
            "impl": "reference",
            **FORMS[self.form],
            **self.policy,
        }

    @property
    def expected_evictions(self) -> int:
        """Per stream. The last of a stream's tokens is written, but no step computes it."""
        if self.policy is None:
            return 0
        return (LENGTH - 2 - self.budget - INTERVAL) // INTERVAL + 1


def study(seeds: list[int]) -> Iterator[Setting]:
    """All settings, the most wanted first."""
    for seed in seeds:
        table = "policies" if seed == seeds[0] else "models"
        yield Setting(table, "full", seed=seed)
        for label, policy in POLICIES.items():
            for form in FORMS:
                if label not in FEW_FORMS or form in ("token/head", "block"):
                    yield Setting(table, label, form, seed=seed, policy=policy)
    for budget in OTHER_BUDGETS:
        for label, policy in POLICIES.items():
            for form in _side_forms(label):
                yield Setting("budgets", label, form, budget, policy=policy)
    yield from _variants()
    yield Setting("own answers", "full", own_answers=True)
    for label in ("gkv", "gkv, no redundancy", "rkv", "snapkv", "recency", "random"):
        for form in _side_forms(label):
            yield Setting("own answers", label, form, own_answers=True, policy=POLICIES[label])


def _side_forms(label: str) -> tuple[str, ...]:
    middle = ("token/all",) if label in MANY_FORMS else ()
    return ("token/head", *middle, "block")


def _variants() -> Iterator[Setting]:
    """What else could close the gaps: how heads agree, blocks per layer, weights, other forms."""
    for combine_by in ("max", "rank"):
        for form in ("token/layer", "token/all", "block"):
            config = {"policy": "gkv", "policy_config": {"combine_by": combine_by}}
            yield Setting("variants", f"gkv, combine_by {combine_by}", form, policy=config)
    for label in ("gkv", "rkv"):
        policy = POLICIES[label] | {"layer_groups": 2}
        yield Setting("variants", f"{label}, layer_groups 2", "block", policy=policy)
    for weight in (0.1, 0.2, 0.8):
        config = {"policy": "gkv", "policy_config": {"score_weight": weight}}
        yield Setting("variants", f"gkv, score_weight {weight}", "token/head", policy=config)
    for alpha in (0.0, 1.0):
        config = {"policy": "gkv", "policy_config": {"alpha": alpha}}
        yield Setting("variants", f"gkv, alpha {alpha}", "token/head", policy=config)
    for label in ("rkv", "snapkv"):
        config = {"policy": label, "policy_config": {"variant": "gkv"}}
        yield Setting("variants", f"{label}, variant gkv", "token/head", policy=config)
    config = {"policy": "snapkv", "policy_config": {"variant": "kvpress"}}
    yield Setting("variants", "snapkv, variant kvpress", "token/head", policy=config)
    config = {"policy": "snapkv", "policy_config": {"kernel": 1}}
    yield Setting("variants", "snapkv, kernel 1", "token/head", policy=config)
