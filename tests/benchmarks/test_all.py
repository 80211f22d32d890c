# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The one command for all GPU benchmarks: its order, its limits, what it stops."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pytest
from gpu import all as every

HANGS = """
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[1]).write_text("started")
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1]).write_text("stopped its server")
"""


def test_what_takes_too_long_may_stop_its_server_and_is_reported(tmp_path: Path) -> None:
    note = tmp_path / "note"
    step = every.Step("slow", [sys.executable, "-c", HANGS, str(note)], minutes=3 / 60)
    started = time.monotonic()
    assert not step.run()
    assert step.status.startswith("stopped after") and time.monotonic() - started < 30
    assert note.read_text() == "stopped its server"


def test_a_failure_is_reported_with_its_status() -> None:
    step = every.Step("broken", [sys.executable, "-c", "raise SystemExit(3)"], minutes=1)
    assert not step.run() and step.status == "failed with status 3"


class Runs:
    """Stands in for running a step; the suite fails where it is told so."""

    def __init__(self, suite_fails: bool) -> None:
        self.suite_fails, self.commands = suite_fails, []

    def __call__(self, step: every.Step) -> bool:
        self.commands.append(step.command)
        step.status = "failed" if step.name == every.SUITE and self.suite_fails else "ok"
        return step.status == "ok"

    def names(self) -> list[str]:
        return [
            Path(command[1]).stem if "-m" not in command else "suite" for command in self.commands
        ]


def run(monkeypatch: pytest.MonkeyPatch, runs: Runs, **more: object) -> list[every.Step]:
    monkeypatch.setattr(every.Step, "run", lambda step: runs(step))
    asked = {"device": "cuda", "quick": False, "record": False, "anyway": False}
    args = argparse.Namespace(**asked | {"budget_minutes": 19.0} | more)
    return every.run_all(args, Path("out"))


def test_the_suite_comes_first_and_the_server_last(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(suite_fails=False)
    run(monkeypatch, runs)
    assert runs.names() == ["suite", "kernels", "decode_step", "serve_ab"]
    minutes = float(runs.commands[-1][runs.commands[-1].index("--budget-minutes") + 1])
    assert minutes == pytest.approx(18.0, abs=0.2)


def test_nothing_is_measured_with_a_failing_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(suite_fails=True)
    steps = run(monkeypatch, runs)
    assert runs.names() == ["suite"]
    assert [step.status for step in steps] == ["failed", "not run", "not run", "not run"]
    runs = Runs(suite_fails=True)
    run(monkeypatch, runs, anyway=True)
    assert len(runs.commands) == 4


def test_on_a_cpu_the_suite_is_skipped_and_all_else_is_a_smoke_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = Runs(suite_fails=False)
    steps = run(monkeypatch, runs, device="cpu", quick=True)
    assert steps[0].status.startswith("skipped")
    assert len(runs.commands) == 3 and all("--quick" in command for command in runs.commands)
