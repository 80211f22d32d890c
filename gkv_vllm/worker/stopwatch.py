# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""How long scoring and moving take: by the host's clock, or on a GPU by events of its stream."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Event(Protocol):
    """What is used of a `torch.cuda.Event` that measures time."""

    def record(self) -> None:
        """The stream passes it after all that was launched before."""

    def query(self) -> bool:
        """Whether the stream has passed it; does not wait."""

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds to `end`, once both have passed."""


class Stopwatch:
    """Sums up the time of pieces of work, each of which counts as so many evictions.

    What runs on a GPU is over some time after it was launched. It counts once it is over, in a
    later step, and nobody waits for it."""

    def __init__(self, new_event: Callable[[], Event] | None = None) -> None:
        """new_event: for work that a GPU does; without, work is over when its call returns."""
        self._new_event = new_event
        self._running: deque[tuple[Event, Event, int]] = deque()
        self._passed: list[tuple[Event, Event]] = []
        """Pairs that may be recorded again."""
        self._events = 0
        self._seconds = 0.0

    def time(self, events: int, work: Callable[[], T]) -> T:
        """Do this work; returns what it returns."""
        if self._new_event is None:
            started = time.perf_counter()
            result = work()
            self._count(events, time.perf_counter() - started)
            return result
        start, end = self._passed.pop() if self._passed else (self._new_event(), self._new_event())
        start.record()
        result = work()
        end.record()
        self._running.append((start, end, events))
        return result

    def take(self) -> tuple[int, float]:
        """Evictions that are known to be over since the last call, and the seconds they took."""
        while self._running and self._running[0][1].query():
            start, end, events = self._running.popleft()
            self._count(events, start.elapsed_time(end) / 1000)
            self._passed.append((start, end))
        taken = self._events, self._seconds
        self._events, self._seconds = 0, 0.0
        return taken

    def _count(self, events: int, seconds: float) -> None:
        self._events += events
        self._seconds += seconds
