# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The messages between scheduler and worker; plain data that pickles, no behaviour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

PLAN_ATTRIBUTE = "gkv_plan"
"""Where a StepPlan rides on vLLM's SchedulerOutput."""

SCORES_ATTRIBUTE = "gkv_scores"
"""Where BlockScores ride on vLLM's ModelRunnerOutput."""


@dataclass(slots=True)
class Recording:
    """Keep the queries of this step's last tokens of one request."""

    slot: int
    num_tokens: int
    """Tokens computed once this step is done: the position after the newest query."""


@dataclass(slots=True)
class Observation:
    """Score the blocks of one request after this step's forward."""

    slot: int
    epoch: int
    num_tokens: int


@dataclass(slots=True)
class StepPlan:
    """What the worker does for one step besides running the model."""

    drops: dict[str, list[int]] = field(default_factory=dict)
    """Logical blocks that left each request's table before this step."""
    reset: list[int] = field(default_factory=list)
    """Slots that change hands: their score history starts at zero."""
    record: dict[str, Recording] = field(default_factory=dict)
    observe: dict[str, Observation] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.drops or self.reset or self.record or self.observe)


@dataclass(slots=True)
class BlockScores:
    """What the worker found for the observed requests of one step."""

    scores: dict[str, tuple[int, Sequence[float]]]
    """Per request: the epoch it was observed in, and one score per logical block (0 at holes)."""
    seconds: float
    """Time spent scoring."""
