# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The interface of an eviction policy; what a policy gets to see is in `view`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from torch import Tensor

    from gkv_vllm.policies.view import View


@dataclass(frozen=True)
class Needs:
    """What the worker must keep for a policy between evictions; keys are always at hand."""

    queries: bool = False
    """The last `window` queries of a request, in a ring: `view.queries`, `view.local_scores`."""
    history: bool = False
    """One number per unit, which `update` renews at every eviction: `view.history`."""
    attention_mass: bool = False
    """The attention that each token got from every query so far: `view.attention_mass`.

    Costs a second pass over the keys in every step, and prompts are reused from the prefix cache
    only as far as they are protected: a query that is not computed gives no attention."""

    seeded: bool = False
    """A number that is the same for the same prompt and seed: `view.key`."""

    @property
    def paged(self) -> bool:
        """Whether every cached token has a number of its own that moves along with it."""
        return self.history or self.attention_mass

    def __post_init__(self) -> None:
        if self.history and self.attention_mass:
            raise ValueError("a policy keeps one number per token: history or attention_mass")


@dataclass(frozen=True)
class GlobalScore:
    """The numbers of G-KV's formula (`GKV`), for operators that compute it in a few launches."""

    alpha: float
    score_weight: float
    temperature: float
    redundancy: Literal["exact", "block", "none"]
    threshold: float = 0.5
    history: Literal["max", "sum"] = "max"
    span: int = 1
    restated: float = 1.0


@dataclass(frozen=True)
class Policy:
    """What stays and what goes. A higher score means: keep.

    A policy is a frozen dataclass; its fields are the keys of `--kv-policy-config`. It sees one
    request in all layers at once (`View`) and scores *units*: tokens, or blocks with block
    granularity. `view.units` turns numbers per token into numbers per unit, so that one `score`
    serves both. The engine owns the rest: rings, top-k, compaction, freeing."""

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        """ValueError for a parameter that is not one of its Literal's values."""
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name, None)
            if not is_choice(hint, value):
                choices = ", ".join(literal_choices(hint))
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")

    def update(self, view: View) -> Tensor:
        """The new history [layers, kv_heads, units] out of the old one, `view.history`.

        Called at each eviction right before `score`, if the policy needs history."""
        raise NotImplementedError

    def score(self, view: View) -> Tensor:
        """Scores [layers, kv_heads, units] in float32. `view.history` is what `update` returned."""
        raise NotImplementedError

    def combine(self, scores: Tensor) -> Tensor:
        """What n layers and heads sharing a kept set agree on: [..., n, units] -> [..., units]."""
        return scores.mean(-2)

    def global_score(self) -> GlobalScore | None:
        """The policy as numbers of one formula, if `update` and `score` are that formula."""
        return None

    @property
    def combine_ranks(self) -> Literal["mean", "max"]:
        """How tensor-parallel ranks agree on what `combine` made of the heads of each."""
        return "mean"


def literal_choices(hint: Any) -> tuple[str, ...]:
    """The values of a Literal, also of an optional one; none for any other type."""
    parts = (
        hint
        if get_origin(hint) is Literal
        else next((part for part in get_args(hint) if get_origin(part) is Literal), None)
    )
    return get_args(parts) if parts is not None else ()


def is_choice(hint: Any, value: Any) -> bool:
    """Whether a Literal among the types of a field allows a value; True where there is none."""
    choices = literal_choices(hint)
    return not choices or value in choices or (value is None and type(None) in get_args(hint))
