# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The interface of an eviction policy; what a policy gets to see is in `view`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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
class Policy:
    """What stays and what goes. A higher score means: keep.

    A policy is a frozen dataclass; its fields are the keys of `--kv-policy-config`. It sees one
    request in all layers at once (`View`) and scores *units*: tokens, or blocks with block
    granularity. `view.units` turns numbers per token into numbers per unit, so that one `score`
    serves both. The engine owns the rest: rings, top-k, compaction, freeing."""

    needs: ClassVar[Needs] = Needs()

    def update(self, view: View) -> Tensor:
        """The new history [layers, kv_heads, units] out of the old one, `view.history`.

        Called at each eviction right before `score`, if the policy needs history."""
        raise NotImplementedError

    def score(self, view: View) -> Tensor:
        """Scores [layers, kv_heads, units] in float32. `view.history` is what `update` returned."""
        raise NotImplementedError

    def combine(self, scores: Tensor) -> Tensor:
        """What n layers and heads that share a kept set agree on: [..., n, units] -> [..., units]."""
        return scores.mean(-2)
