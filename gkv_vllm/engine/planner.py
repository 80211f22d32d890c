# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Decides who is recorded, who has to lose tokens and which blocks go; no torch, no vLLM."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gkv_vllm.config import KVPolicyConfig, RequestPolicy
from gkv_vllm.engine.footprint import blocks_for, due_tokens, protected_blocks
from gkv_vllm.engine.plan import (
    Compaction,
    Observation,
    Recording,
    Selection,
    StepPlan,
    WorkerReport,
)
from gkv_vllm.metrics import EvictionStats
from gkv_vllm.policies.base import Needs

logger = logging.getLogger(f"vllm.{__name__}")  # under vLLM's logger, which has the handlers

OVERDUE_FACTOR = 4
"""A request that ran this many times (budget + interval) tokens without an eviction is reported."""


@dataclass(slots=True)
class Track:
    """One request whose tokens may be evicted."""

    key: int
    epoch: int
    protected: int
    budget: int
    due: int
    next_block: int
    """First logical block that has never been a candidate."""
    survivors: tuple[list[int], ...]
    """Per layer group the unprotected blocks below `next_block` still held, oldest first."""
    holes: int = 0
    events: int = 0
    slot: int | None = None
    unrecorded: int = 0
    """Tokens computed at the last step that had to be recorded and found no slot."""
    pending: Selection | None = None
    """The request fell due and waits: for its scores, or for the next step to be scheduled."""
    scores: list[Sequence[float]] | None = None
    warned: bool = False

    def unprotected(self, num_tokens: int, block_size: int) -> int:
        """Tokens that count against the budget once `num_tokens` are computed."""
        return num_tokens - (self.protected + self.holes) * block_size


class EvictionPlanner:
    """Applies the rules of docs/design.md ("The planner's rules") to all requests of an engine."""

    def __init__(
        self,
        config: KVPolicyConfig,
        needs: Needs,
        *,
        block_size: int,
        num_slots: int,
        stats: EvictionStats | None = None,
    ) -> None:
        self.config = config
        self.needs = needs
        self.block_size = block_size
        self.stats = stats if stats is not None else EvictionStats()
        self.tracks: dict[str, Track] = {}
        self._free_slots = list(reversed(range(num_slots)))
        self._epochs = itertools.count(1)
        self._ready: dict[str, None] = {}
        """Requests whose eviction can happen before the next step."""
        self._next = StepPlan()
        """What the next plan will say about evictions that have happened since the last."""

    # ---- the life of a request

    def add(
        self, request_id: str, *, prompt_tokens: int, policy: RequestPolicy, key: int = 0
    ) -> None:
        """Start to follow a request. `key` seeds policies that draw at random."""
        self.remove(request_id)
        if not policy.evict:
            self.stats.skip("opted_out")
            return
        protected = protected_blocks(policy.protect, prompt_tokens, self.block_size)
        budget = blocks_for(policy.budget, self.block_size)
        due = due_tokens(policy.budget, self.config.interval, self.block_size)
        self._start(request_id, key=key, protected=protected, budget=budget, due=due)

    def restart(self, request_id: str) -> None:
        """The request was preempted: it lost its blocks and starts over, with nothing evicted."""
        track = self.tracks.get(request_id)
        if track is None:
            return
        self._forget(request_id, track)
        self._start(
            request_id,
            key=track.key,
            protected=track.protected,
            budget=track.budget,
            due=track.due,
        )

    def remove(self, request_id: str) -> None:
        """The request ended, however it ended."""
        track = self.tracks.pop(request_id, None)
        if track is not None:
            self._forget(request_id, track)

    def _start(self, request_id: str, *, key: int, protected: int, budget: int, due: int) -> None:
        self.tracks[request_id] = Track(
            key=key,
            epoch=next(self._epochs),
            protected=protected,
            budget=budget,
            due=due,
            next_block=protected,
            survivors=tuple([] for _ in range(self.config.layer_groups)),
        )

    def _forget(self, request_id: str, track: Track) -> None:
        if track.slot is not None:
            self._free_slots.append(track.slot)
        self._ready.pop(request_id, None)
        self._next.drops.pop(request_id, None)
        self._next.compact.pop(request_id, None)

    def usable_prefix(self, request_id: str) -> int | None:
        """How many cached leading tokens a request may start with; None for as many as there are.

        Of the unprotected ones so few that the queries of its first window are computed, not
        found, and that it holds no more than any other request; none of them if every query
        counts."""
        track = self.tracks.get(request_id)
        if track is None:
            return None
        protected = track.protected * self.block_size
        if self.needs.attention_mass:
            return protected
        return protected + track.due - self.config.window

    # ---- before vLLM schedules

    def accept(self, report: WorkerReport) -> None:
        """Take the scores of a finished step; those of a request that has moved on are dropped."""
        for _ in range(report.events):
            self.stats.record_seconds(report.seconds / report.events)
        for request_id, (epoch, scores) in report.scores.items():
            track = self.tracks.get(request_id)
            if track is None or track.epoch != epoch or track.pending is None:
                self.stats.skip("stale")
                continue
            track.scores = [list(map(float, of_group)) for of_group in scores]
            self._ready[request_id] = None

    def evictions(self) -> dict[str, tuple[list[int], ...]]:
        """Block granularity: the logical blocks, per layer group, that requests lose now.

        The caller frees them before it allocates; the next plan tells the worker."""
        victims = {}
        for request_id in self._ready:
            track = self.tracks[request_id]
            assert track.pending is not None
            assert track.scores is not None
            victims[request_id] = tuple(
                _lowest(candidates, scores, len(candidates) - track.pending.keep)
                for candidates, scores in zip(track.pending.candidates, track.scores, strict=True)
            )
            self._evict(request_id, track, victims[request_id])
        self._ready.clear()
        return victims

    def compactions(self) -> dict[str, Selection]:
        """Token granularity: the requests that lose tokens now, for the caller to find targets.

        The caller answers each with `compacted` or `postpone`, before it allocates."""
        due = {}
        for request_id in self._ready:
            pending = self.tracks[request_id].pending
            assert pending is not None
            due[request_id] = pending
        self._ready.clear()
        return due

    def compacted(
        self, request_id: str, targets: list[int], fresh: dict[int, dict[int, int]]
    ) -> None:
        """The survivors of a request go to these logical blocks; the next plan tells the worker."""
        track = self.tracks[request_id]
        assert track.pending is not None
        self._next.compact[request_id] = Compaction(track.pending, targets, fresh)
        stay = set(targets)
        gone = [block for block in track.pending.candidates[0] if block not in stay]
        self._evict(request_id, track, (gone,))

    def postpone(self, request_id: str, reason: str) -> None:
        """The request cannot lose tokens now; it falls due again in its next step."""
        self.tracks[request_id].pending = None
        self.stats.skip(reason)

    def _evict(self, request_id: str, track: Track, gone: tuple[list[int], ...]) -> None:
        assert track.pending is not None
        seen, track.pending, track.scores = track.pending, None, None
        track.next_block = max(track.next_block, *(group[-1] + 1 for group in seen.candidates))
        track.survivors = tuple(
            sorted(set(candidates) - set(left))
            for candidates, left in zip(seen.candidates, gone, strict=True)
        )
        track.holes += len(gone[0])
        track.events += 1
        track.warned = False
        self._next.drops[request_id] = gone
        self.stats.record_eviction(
            blocks_freed=sum(map(len, gone)),
            tokens_evicted=len(gone[0]) * self.block_size,
            live_tokens=seen.num_tokens - track.holes * self.block_size,
        )

    # ---- after vLLM has scheduled

    def plan(self, scheduled: Iterable[tuple[str, int]]) -> StepPlan:
        """The worker's orders for the step just scheduled.

        `scheduled`: request id and the tokens it will have computed after this step."""
        plan, self._next = self._next, StepPlan()
        for request_id, num_tokens in scheduled:
            track = self.tracks.get(request_id)
            if track is not None:
                self._plan_request(plan, request_id, track, num_tokens)
        return plan

    def _plan_request(self, plan: StepPlan, request_id: str, track: Track, num_tokens: int) -> None:
        if self.needs.attention_mass:
            plan.accumulate[request_id] = track.protected * self.block_size
        unprotected = track.unprotected(num_tokens, self.block_size)
        if unprotected <= track.due - self.config.window:
            return
        self._warn_if_overdue(request_id, track, unprotected)
        if self._needs_slot and track.slot is None and not self._acquire_slot(plan, track):
            track.unrecorded = num_tokens
            self.stats.skip("no_slot")
            return
        if self.needs.queries:
            assert track.slot is not None
            plan.record[request_id] = Recording(track.slot, num_tokens)
        # Only a slot that came late can lack queries of the window.
        whole_window = num_tokens - track.unrecorded >= self.config.window
        if unprotected >= track.due and track.pending is None and whole_window:
            self._select(plan, request_id, track, num_tokens)

    @property
    def _needs_slot(self) -> bool:
        return self.needs.queries or (self.needs.history and not self.config.moves_tokens)

    def _acquire_slot(self, plan: StepPlan, track: Track) -> bool:
        if not self._free_slots:
            return False
        track.slot = self._free_slots.pop()
        plan.reset.append(track.slot)
        return True

    def _select(self, plan: StepPlan, request_id: str, track: Track, num_tokens: int) -> None:
        """The request is due once this step is done: say among which blocks to choose."""
        end = (num_tokens - self.config.window) // self.block_size
        candidates = tuple(group + list(range(track.next_block, end)) for group in track.survivors)
        live = blocks_for(track.unprotected(num_tokens, self.block_size), self.block_size)
        keep = len(candidates[0]) - (live - track.budget)
        if not 0 <= keep < len(candidates[0]):
            self.stats.skip("no_candidates")
            return
        track.pending = Selection(
            slot=track.slot,
            num_tokens=num_tokens,
            protected=track.protected,
            candidates=candidates,
            keep=keep,
            remembered=len(track.survivors[0]),
            event=track.events,
            key=track.key,
        )
        if self.config.moves_tokens:
            self._ready[request_id] = None
        else:
            plan.observe[request_id] = Observation(track.epoch, track.pending)

    def _warn_if_overdue(self, request_id: str, track: Track, unprotected: int) -> None:
        if unprotected < OVERDUE_FACTOR * track.due or track.warned:
            return
        track.warned = True
        logger.warning(
            "gkv_vllm: request %s holds %d unprotected tokens, %d times its budget and interval, "
            "and none was evicted; gkv:skipped_total says why",
            request_id,
            unprotected,
            unprotected // track.due,
        )


def _lowest(blocks: list[int], scores: Sequence[float], count: int) -> list[int]:
    """The `count` blocks of lowest score, in order; of equals the older ones."""
    order = sorted(range(len(blocks)), key=lambda i: (scores[i], i))
    return sorted(blocks[i] for i in order[:count])


def choose_targets(private: Sequence[bool], keep: int) -> tuple[list[int], list[int]]:
    """Where `keep` blocks of survivors go: places among the candidates, and which need a new block.

    The first private ones: what leads there keeps its place. A shared block is never written, so
    if the private ones are too few, the first shared ones are replaced by new blocks."""
    own = [place for place, is_private in enumerate(private) if is_private][:keep]
    shared = [place for place, is_private in enumerate(private) if not is_private]
    fresh = shared[: keep - len(own)]
    return sorted(own + fresh), fresh
