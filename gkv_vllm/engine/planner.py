# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Decides who is recorded, who is observed and which blocks go; plain numbers, no torch or vLLM."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gkv_vllm.config import KVPolicyConfig, RequestPolicy
from gkv_vllm.engine.footprint import blocks_for, due_tokens, protected_blocks
from gkv_vllm.engine.plan import BlockScores, Observation, Recording, StepPlan
from gkv_vllm.metrics import EvictionStats
from gkv_vllm.policies.base import Policy, RankView

logger = logging.getLogger(f"vllm.{__name__}")  # under vLLM's logger, which has the handlers

OVERDUE_FACTOR = 4
"""A request that ran this many times (budget + interval) tokens without an eviction is reported."""


@dataclass(slots=True)
class Track:
    """One request whose blocks may be evicted."""

    key: int
    epoch: int
    protected: int
    budget: int
    due: int
    next_block: int
    """First logical block that has never been a candidate."""
    survivors: list[int] = field(default_factory=list)
    """Unprotected blocks below `next_block` that are still held, oldest first."""
    holes: int = 0
    events: int = 0
    slot: int | None = None
    unrecorded: int = 0
    """Tokens computed at the last step that had to be recorded and found no slot."""
    observed_at: int | None = None
    """Tokens computed at the observation that waits for its scores."""
    scores: Sequence[float] | None = None
    ready_seconds: float = 0.0
    warned: bool = False

    def unprotected(self, num_tokens: int, block_size: int) -> int:
        """Tokens that count against the budget once `num_tokens` are computed."""
        return num_tokens - (self.protected + self.holes) * block_size


class EvictionPlanner:
    """Applies the rules of docs/design.md ("The planner's rules") to all requests of an engine."""

    def __init__(
        self,
        config: KVPolicyConfig,
        policy: Policy,
        *,
        block_size: int,
        num_slots: int,
        stats: EvictionStats | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.block_size = block_size
        self.stats = stats if stats is not None else EvictionStats()
        self.tracks: dict[str, Track] = {}
        self._free_slots = list(reversed(range(num_slots)))
        self._epochs = itertools.count(1)
        self._reset: list[int] = []
        self._ready: dict[str, None] = {}
        self._drops: dict[str, list[int]] = {}

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
        self.tracks[request_id] = Track(
            key=key,
            epoch=next(self._epochs),
            protected=protected,
            budget=blocks_for(policy.budget, self.block_size),
            due=due_tokens(policy.budget, self.config.interval, self.block_size),
            next_block=protected,
        )

    def restart(self, request_id: str) -> None:
        """The request was preempted: it lost its blocks and starts over, with nothing evicted."""
        track = self.tracks.get(request_id)
        if track is None:
            return
        self._forget(request_id, track)
        self.tracks[request_id] = Track(
            key=track.key,
            epoch=next(self._epochs),
            protected=track.protected,
            budget=track.budget,
            due=track.due,
            next_block=track.protected,
        )

    def usable_prefix(self, request_id: str) -> int | None:
        """How many cached leading tokens a request may start with; None for as many as there are.

        Of the unprotected ones so few that the queries of its first window are computed, not
        found, and that it holds no more than any other request."""
        track = self.tracks.get(request_id)
        if track is None:
            return None
        return track.protected * self.block_size + track.due - self.config.window

    def remove(self, request_id: str) -> None:
        """The request ended, however it ended."""
        track = self.tracks.pop(request_id, None)
        if track is not None:
            self._forget(request_id, track)

    def _forget(self, request_id: str, track: Track) -> None:
        if track.slot is not None:
            self._free_slots.append(track.slot)
        self._ready.pop(request_id, None)
        self._drops.pop(request_id, None)

    # ---- before vLLM schedules

    def accept(self, block_scores: BlockScores) -> None:
        """Take the scores of a finished step; those of a request that has moved on are dropped."""
        share = block_scores.seconds / max(1, len(block_scores.scores))
        for request_id, (epoch, scores) in block_scores.scores.items():
            track = self.tracks.get(request_id)
            if track is None or track.epoch != epoch or track.observed_at is None:
                self.stats.skip("stale")
                continue
            track.scores = scores
            track.ready_seconds = share
            self._ready[request_id] = None

    def evictions(self) -> dict[str, list[int]]:
        """The logical blocks that each request with scores loses now.

        The caller frees them before it allocates; the next plan tells the worker."""
        victims = {}
        for request_id in self._ready:
            started = time.perf_counter()
            track = self.tracks[request_id]
            chosen = self._choose(track)
            seconds = track.ready_seconds + time.perf_counter() - started
            self._commit(track, chosen, seconds)
            if chosen:
                victims[request_id] = chosen
        self._ready.clear()
        self._drops.update(victims)
        return victims

    def _candidates(self, track: Track, num_tokens: int) -> list[int]:
        """Unprotected live blocks whose tokens are all older than the window."""
        end = (num_tokens - self.config.window) // self.block_size
        return track.survivors + list(range(track.next_block, end))

    def _choose(self, track: Track) -> list[int]:
        assert track.observed_at is not None
        assert track.scores is not None
        num_tokens, scores = track.observed_at, track.scores
        live = blocks_for(track.unprotected(num_tokens, self.block_size), self.block_size)
        candidates = self._candidates(track, num_tokens)
        candidates.sort(key=lambda block: (scores[block], block))
        return sorted(candidates[: max(0, live - track.budget)])

    def _commit(self, track: Track, chosen: list[int], seconds: float) -> None:
        assert track.observed_at is not None
        num_tokens = track.observed_at
        track.observed_at = track.scores = None
        if not chosen:
            self.stats.skip("no_candidates")
            return
        gone = set(chosen)
        candidates = self._candidates(track, num_tokens)
        track.next_block = max(track.next_block, candidates[-1] + 1)
        track.survivors = [block for block in candidates if block not in gone]
        track.holes += len(chosen)
        track.events += 1
        track.warned = False
        self.stats.record_eviction(
            blocks_freed=len(chosen),
            tokens_evicted=len(chosen) * self.block_size,
            live_tokens=num_tokens - track.holes * self.block_size,
            seconds=seconds,
        )

    # ---- after vLLM has scheduled

    def plan(self, scheduled: Iterable[tuple[str, int]]) -> StepPlan:
        """The worker's orders for the step just scheduled.

        `scheduled`: request id and the tokens it will have computed after this step."""
        plan = StepPlan()
        for request_id, num_tokens in scheduled:
            track = self.tracks.get(request_id)
            if track is not None:
                self._plan_request(plan, request_id, track, num_tokens)
        plan.drops, self._drops = self._drops, {}
        plan.reset, self._reset = self._reset, []
        return plan

    def _plan_request(self, plan: StepPlan, request_id: str, track: Track, num_tokens: int) -> None:
        unprotected = track.unprotected(num_tokens, self.block_size)
        if unprotected <= track.due - self.config.window:
            return
        self._warn_if_overdue(request_id, track, unprotected)
        is_due = unprotected >= track.due and track.observed_at is None
        if not self.policy.needs_queries:
            if is_due:
                self._rank_now(request_id, track, num_tokens)
            return
        if track.slot is None and not self._acquire_slot(track):
            track.unrecorded = num_tokens
            self.stats.skip("no_slot")
            return
        assert track.slot is not None
        plan.record[request_id] = Recording(track.slot, num_tokens)
        # Only a slot that came late can lack queries of the window.
        if is_due and num_tokens - track.unrecorded >= self.config.window:
            track.observed_at = num_tokens
            plan.observe[request_id] = Observation(track.slot, track.epoch, num_tokens)

    def _rank_now(self, request_id: str, track: Track, num_tokens: int) -> None:
        """A policy that needs no queries ranks in the step that makes the request due."""
        started = time.perf_counter()
        candidates = self._candidates(track, num_tokens)
        ranks = self.policy.rank(RankView(key=track.key, event=track.events, blocks=candidates))
        scores = [0.0] * blocks_for(num_tokens, self.block_size)
        for block, rank in zip(candidates, ranks, strict=True):
            scores[block] = rank
        track.observed_at, track.scores = num_tokens, scores
        track.ready_seconds = time.perf_counter() - started
        self._ready[request_id] = None

    def _acquire_slot(self, track: Track) -> bool:
        if not self._free_slots:
            return False
        track.slot = self._free_slots.pop()
        self._reset.append(track.slot)
        return True

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
