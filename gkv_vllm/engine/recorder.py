# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Follows the messages between scheduler and worker and writes down what requests lost.

Nothing else in the engine knows of it: without `record_positions` there is no recorder.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gkv_vllm.config import NO_POLICY, KVPolicyConfig, RequestPolicy
from gkv_vllm.engine.plan import Observation, Selection, StepPlan, WorkerReport
from gkv_vllm.record import Event, Header, RecordWriter, folder_bytes

logger = logging.getLogger(f"vllm.{__name__}")  # under vLLM's logger, which has the handlers

RECORD_BYTES = 256 << 20
"""A record that has grown to this takes no more events."""
FOLDER_BYTES = 4 << 30
"""While a folder holds this much, no new record begins."""
WAITING_EVENTS = 32
"""Events that may wait for the disk; a record whose events come faster is cut off."""


@dataclass(slots=True, eq=False)
class _Follow:
    """One recorded request since it last started from its prompt."""

    epoch: int
    file: _File
    held: np.ndarray
    """Token granularity: the positions that survived the last event, [a, b, tokens]."""
    orders: deque[_Order] = field(default_factory=deque)
    """Compactions that the worker was told of, oldest first, until they are written down."""
    observed: Observation | None = None
    """Block granularity: what the worker was told to score."""
    scores: np.ndarray | None = None
    """[layer groups, candidates], once the worker has."""


@dataclass(slots=True, eq=False)
class _Order:
    """One compaction."""

    follow: _Follow
    selection: Selection
    outcome: tuple[np.ndarray, np.ndarray] | None = None
    """Which places among the candidates stayed, and the scores that decided."""

    @property
    def known(self) -> bool:
        """Where none may stay, nothing is scored."""
        return self.outcome is not None or not self.selection.keep


@dataclass(slots=True, eq=False)
class _File:
    """A request's file; only the writing thread touches `writer`."""

    header: Header
    cut: bool = False
    """Whether events were left out: the file ends with those before."""
    writer: RecordWriter | None = None


class Recorder:
    """One file for each request that asked, written by a thread of its own.

    Positions are followed here, by what moved: the worker reports places among the candidates, and
    knows no positions. So a request that is not recorded costs nothing."""

    def __init__(
        self,
        folder: Path,
        config: KVPolicyConfig,
        *,
        model: str,
        kv_heads: int,
        layer_groups: list[int],
        block_size: int,
    ) -> None:
        """layer_groups: of each layer that loses tokens, in the model's order."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config = config
        self.model = model
        self.kv_heads = kv_heads
        self.layer_groups = layer_groups
        self.block_size = block_size
        self._follows: dict[str, _Follow] = {}
        self._orders: dict[int, _Order] = {}
        self._count = 0
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="gkv-recorder", daemon=True)
        self._thread.start()

    # ---- the life of a request

    def begin(self, request_id: str, policy: RequestPolicy) -> None:
        """The request asked to be recorded."""
        file = _File(self._header(request_id, policy))
        self._follows[request_id] = self._start(0, file)
        self._write(file, lambda: self._open(file))

    def _header(self, request_id: str, policy: RequestPolicy) -> Header:
        return Header(
            request_id=request_id,
            model=self.model,
            policy=self.config.policy if policy.evict else NO_POLICY,
            granularity=self.config.granularity,
            scope=self.config.scope,
            protect=policy.protect,
            budget=policy.budget,
            interval=self.config.interval,
            window=self.config.window,
            block_size=self.block_size,
            layers=len(self.layer_groups),
            kv_heads=self.kv_heads,
            layer_groups=self.layer_groups,
        )

    def restart(self, request_id: str) -> None:
        """The request was preempted: it starts over, with nothing evicted."""
        follow = self._follows.get(request_id)
        if follow is not None:
            self._follows[request_id] = self._start(follow.epoch + 1, follow.file)

    def _start(self, epoch: int, file: _File) -> _Follow:
        return _Follow(epoch, file, held=np.empty((*file.header.shape, 0), dtype=np.int32))

    def end(
        self, request_id: str, *, token_ids: Sequence[int], prompt_tokens: int, finish: str
    ) -> None:
        """The request ended, however it ended. What the worker has not reported yet is left out."""
        follow = self._follows.pop(request_id, None)
        if follow is None:
            return
        file, ids = follow.file, np.array(token_ids, dtype=np.int32)
        self._orders = {n: o for n, o in self._orders.items() if o.follow.file is not file}

        def close() -> None:
            if file.writer is not None:
                file.writer.truncated |= file.cut
                file.writer.close(
                    token_ids=ids,
                    prompt_tokens=prompt_tokens,
                    preemptions=follow.epoch,
                    finish=finish,
                )

        self._write(file, close)

    @property
    def followed(self) -> list[str]:
        """The recorded requests that have not ended."""
        return list(self._follows)

    # ---- one step

    def planned(self, plan: StepPlan) -> None:
        """The worker will be told this. Numbers the compactions whose outcome it has to report."""
        if not self._follows:
            return
        for request_id, left in plan.drops.items():
            follow = self._follows.get(request_id)
            if follow is not None and follow.scores is not None:
                self._dropped(follow, left)
        # After the drops, which follow from what was observed before.
        for request_id, observation in plan.observe.items():
            if follow := self._follows.get(request_id):
                follow.observed = observation
        for request_id, compaction in plan.compact.items():
            if follow := self._follows.get(request_id):
                order = _Order(follow, compaction.selection)
                follow.orders.append(order)
                if compaction.targets:
                    compaction.record = self._count
                    self._orders[self._count] = order
                    self._count += 1
                self._write_compacted(follow)

    def reported(self, report: WorkerReport) -> None:
        """The worker has told this."""
        for request_id, (epoch, scores) in report.scores.items():
            follow = self._follows.get(request_id)
            if follow and follow.observed is not None and follow.observed.epoch == epoch:
                follow.scores = np.array(scores, dtype=np.float32)
        for number, (keep, scores) in report.kept.items():
            order = self._orders.pop(number, None)
            if order is not None:
                order.outcome = np.asarray(keep), np.asarray(scores)
                self._write_compacted(order.follow)

    def _dropped(self, follow: _Follow, left: tuple[list[int], ...]) -> None:
        """Block granularity: these blocks left, by the scores that the worker found before."""
        assert follow.observed is not None
        assert follow.scores is not None
        seen = follow.observed.selection
        blocks = np.array(seen.candidates)
        kept = np.array([~np.isin(*pair) for pair in zip(blocks, left, strict=True)])
        positions = blocks * self.block_size
        self._event(follow, seen, positions[:, None], follow.scores[:, None], kept[:, None])
        follow.scores = None

    def _write_compacted(self, follow: _Follow) -> None:
        """Write down the compactions whose outcome is known, in their order."""
        while follow.orders and (order := follow.orders[0]).known:
            follow.orders.popleft()
            seen, size = order.selection, self.block_size
            held = follow.held[..., : seen.remembered * size]
            blocks = np.array(seen.candidates[0][seen.remembered :], dtype=np.int32)
            fresh = (blocks[:, None] * size + np.arange(size, dtype=np.int32)).reshape(-1)
            fresh = np.broadcast_to(fresh, (*held.shape[:2], len(fresh)))
            positions = np.concatenate([held, fresh], axis=-1)
            kept = np.zeros(positions.shape, dtype=bool)
            scores = np.full(positions.shape, np.nan, dtype=np.float32)
            if order.outcome is not None:
                keep, scores = order.outcome
                np.put_along_axis(kept, keep, True, axis=-1)
            self._event(follow, seen, positions, scores, kept)
            follow.held = positions[kept].reshape(*held.shape[:2], -1)

    def _event(
        self,
        follow: _Follow,
        seen: Selection,
        positions: np.ndarray,
        scores: np.ndarray,
        kept: np.ndarray,
    ) -> None:
        size, file = self.block_size, follow.file
        event = Event(
            number=seen.event,
            epoch=follow.epoch,
            num_tokens=seen.num_tokens,
            protected=seen.protected * size,
            recent=(seen.num_tokens - file.header.window) // size * size,
            positions=positions,
            scores=scores,
            kept=kept,
        )

        def add() -> None:
            if file.writer is not None:
                file.writer.add(event)

        # Nobody who is served waits for the disk.
        file.cut |= self._jobs.qsize() >= WAITING_EVENTS
        if not file.cut:
            self._write(file, add)

    # ---- the writing thread

    def flush(self) -> None:
        """Wait until everything so far is on the disk."""
        done = threading.Event()
        self._jobs.put(done.set)
        done.wait()

    def close(self) -> None:
        """The engine shuts down."""
        self._jobs.put(None)
        self._thread.join(timeout=30)

    def _write(self, file: _File, job: Callable[[], None]) -> None:
        """Let the thread do this; a disk that is full costs this record, and nothing else."""

        def guarded() -> None:
            try:
                job()
            except Exception as error:  # the thread must live on for the other records
                logger.warning("a record of evictions is lost: %r", error)
                if file.writer is not None:
                    file.writer.discard()
                file.writer = None

        self._jobs.put(guarded)

    def _open(self, file: _File) -> None:
        if (held := folder_bytes(self.folder)) >= FOLDER_BYTES:
            logger.warning(
                "request %s is not recorded: %s holds %.1f GiB of records already; move them away",
                file.header.request_id,
                self.folder,
                held / 2**30,
            )
            return
        file.writer = RecordWriter(self.folder, file.header, RECORD_BYTES)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
