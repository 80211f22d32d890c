# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""A GPU's time is that between two events, known once they have passed, and never waited for."""

from __future__ import annotations

from collections.abc import Callable
from time import sleep
from typing import Any

import pytest
import torch

from gkv_vllm.worker.stopwatch import Event, Stopwatch


class Stream:
    """A stream that runs when told to, one millisecond for each of its pieces of work."""

    def __init__(self) -> None:
        self.launched: list[Callable[[int], None]] = []
        self.now = 0
        self.made = 0

    def new_event(self) -> Event:
        self.made += 1
        return StreamEvent(self)

    def launch(self, milliseconds: int) -> None:
        def work(_: int) -> None:
            self.now += milliseconds

        self.launched.append(work)

    def run(self, pieces: int) -> None:
        for piece in self.launched[:pieces]:
            piece(self.now)
        del self.launched[:pieces]


class StreamEvent:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.at: int | None = 0  # a new event counts as passed, as those of CUDA do

    def record(self) -> None:
        self.at = None

        def passed(now: int) -> None:
            self.at = self.stream.now

        self.stream.launched.append(passed)

    def query(self) -> bool:
        return self.at is not None

    def elapsed_time(self, end: Any) -> float:
        assert self.at is not None
        assert end.at is not None, "reading an event that has not passed would raise"
        return float(end.at - self.at)


def test_what_the_device_does_counts_when_it_is_over() -> None:
    stream = Stream()
    watch = Stopwatch(stream.new_event)
    assert watch.time(3, lambda: stream.launch(20)) is None
    stream.launch(500)  # the model's forward
    watch.time(1, lambda: stream.launch(4))
    assert watch.take() == (0, 0.0)
    stream.run(2)  # the work, but not the event behind it
    assert watch.take() == (0, 0.0)
    stream.run(1)
    assert watch.take() == (3, 0.02)
    stream.run(4)
    assert watch.take() == (1, 0.004)
    assert watch.take() == (0, 0.0)


def test_what_is_over_together_is_one_sum() -> None:
    stream = Stream()
    watch = Stopwatch(stream.new_event)
    for milliseconds in (5, 7):
        watch.time(2, lambda milliseconds=milliseconds: stream.launch(milliseconds))
    stream.run(6)
    assert watch.take() == (4, pytest.approx(0.012))


def test_events_are_used_again_once_they_were_read() -> None:
    stream = Stream()
    watch = Stopwatch(stream.new_event)
    for _ in range(2):
        watch.time(1, lambda: stream.launch(1))
    assert stream.made == 4
    stream.run(6)
    for _ in range(10):
        watch.take()
        watch.time(1, lambda: stream.launch(1))
        stream.run(3)
    assert stream.made == 4


def test_without_a_device_work_is_over_when_it_returns() -> None:
    watch = Stopwatch()

    def work() -> str:
        sleep(0.002)
        return "scores"

    assert watch.time(2, work) == "scores"
    events, seconds = watch.take()
    assert events == 2
    assert 0.002 <= seconds < 10
    assert watch.take() == (0, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_events_of_cuda_measure_the_device() -> None:
    watch = Stopwatch(lambda: torch.cuda.Event(enable_timing=True))
    numbers = torch.rand(4096, 4096, device="cuda")
    watch.time(5, lambda: [numbers @ numbers for _ in range(20)])
    torch.cuda.synchronize()
    events, seconds = watch.take()
    assert events == 5
    assert 1e-4 < seconds < 60
