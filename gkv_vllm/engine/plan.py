# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The messages between scheduler and worker; plain data that pickles."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

PLAN_ATTRIBUTE = "gkv_plan"
"""Where a StepPlan rides on vLLM's SchedulerOutput."""

REPORT_ATTRIBUTE = "gkv_report"
"""Where a WorkerReport rides on vLLM's ModelRunnerOutput."""


@dataclass(slots=True)
class Recording:
    """Keep the queries of this step's last tokens of one request."""

    slot: int
    num_tokens: int
    """Tokens computed once this step is done: the position after the newest query."""


@dataclass(slots=True)
class Selection:
    """One request has to lose some of its candidates: all that scoring them takes."""

    slot: int | None
    """Its ring and block history; None when the policy needs neither."""
    num_tokens: int
    """Tokens computed when it fell due: its window ends here."""
    protected: int
    """Leading logical blocks that never go."""
    candidates: tuple[list[int], ...]
    """Per layer group the logical blocks that may go, oldest first: equally many in each."""
    keep: int
    """How many blocks of candidates stay: whole ones, or filled with surviving tokens."""
    remembered: int
    """How many leading candidates were scored before and stayed: only these have a history."""
    event: int
    """How many evictions the request has had since it last started from its prompt."""
    key: int
    """Seeds policies that draw at random."""


@dataclass(slots=True)
class Observation:
    """Block granularity: score the candidates of one request after this step's forward."""

    epoch: int
    selection: Selection


@dataclass(slots=True)
class Compaction:
    """Token granularity: before this step, move the surviving tokens into the target blocks."""

    selection: Selection
    targets: list[int]
    """Logical blocks that hold the survivors from now on, `selection.keep` of them; the other
    candidates are dropped."""
    fresh: dict[int, dict[int, int]] = field(default_factory=dict)
    """KV cache group -> target -> block id, for targets that took the place of a shared block."""
    record: int | None = None
    """Under this number the worker reports what stayed; None for a request that is not recorded."""


@dataclass(slots=True)
class StepPlan:
    """What the worker does for one step besides running the model, in this order."""

    compact: dict[str, Compaction] = field(default_factory=dict)
    drops: dict[str, tuple[list[int], ...]] = field(default_factory=dict)
    """Per request and layer group, the logical blocks that left its table before this step."""
    reset: list[int] = field(default_factory=list)
    """Slots that change hands: their history starts at zero."""
    record: dict[str, Recording] = field(default_factory=dict)
    accumulate: dict[str, int] = field(default_factory=dict)
    """Per request its protected tokens: the others accumulate the attention of this step."""
    observe: dict[str, Observation] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(getattr(self, message.name) for message in fields(self))


@dataclass(slots=True)
class WorkerReport:
    """What the worker did and found in one step."""

    scores: dict[str, tuple[int, Any]]
    """Per observed request: its epoch, and per layer group one score for each candidate.

    From a GPU they are NumPy arrays, whose numbers arrive together with the step's tokens."""
    events: int
    """Requests that were scored, or scored and compacted, and whose time is known: from a GPU it
    is a few steps later."""
    seconds: float
    """Time that these took."""
    kept: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    """Of recorded compactions, by number: the places among the candidates that stayed, and the
    scores that decided, [layers or 1, kv_heads or 1, tokens] each. Arrays as in `scores`."""

    def after(self, earlier: WorkerReport | None) -> WorkerReport:
        """Both together; a step that samples nothing leaves its report to the next one."""
        if earlier is None:
            return self
        return WorkerReport(
            {**earlier.scores, **self.scores},
            earlier.events + self.events,
            earlier.seconds + self.seconds,
            {**earlier.kept, **self.kept},
        )
