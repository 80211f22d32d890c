# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""All GPU measurements in one go, in under twenty minutes: suite, kernels, decode step, server.

    python benchmarks/gpu/all.py                       # writes results/DEVICE/
    python benchmarks/gpu/all.py --quick --device cpu  # every path, no numbers

The `gpu` test suite comes first: what is wrong is not measured, unless `--anyway`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder's kernels.py would hide the package of that name
    sys.path[0] = str(Path(__file__).parents[1])

import machine
from gpu import common

HERE = Path(__file__).parent
SUITE = "suite"
MINUTES = {SUITE: 4.0, "kernels": 5.0, "decode_step": 4.0}
"""The most that each may take; the server gets what is left."""
LEAST_SERVER_MINUTES = 5.0
STOP_SECONDS = 40.0


def _heed_interrupts() -> None:
    """In the child: a job that a shell put into the background ignores them, and so would it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Step:
    """One part, and how it went."""

    name: str
    command: list[str]
    minutes: float
    status: str = "not run"
    seconds: float = 0.0

    def run(self) -> bool:
        """Run it to its end or its limit, with its output on ours; whether it succeeded."""
        print(f"--- {self.name}: {shlex.join(self.command)}", flush=True)
        started = time.monotonic()
        process = subprocess.Popen(
            self.command, cwd=machine.ROOT, env=environment(), preexec_fn=_heed_interrupts
        )
        try:
            code = process.wait(60 * self.minutes)
            self.status = "ok" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            self.status = f"stopped after {self.minutes:.0f} minutes"
            process.send_signal(signal.SIGINT)  # it may have a server to stop
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:
            process.kill()
            process.wait()
        self.seconds = round(time.monotonic() - started, 1)
        print(f"--- {self.name}: {self.status}, {self.seconds:.0f} s", flush=True)
        return self.status == "ok"


def environment() -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return quiet | dict(os.environ)


def suite() -> list[str]:
    """pytest on what runs on a device; `-P`, since the root holds a folder that hides a module."""
    folders = ["tests/gpu", "tests/triton"]
    return [sys.executable, "-P", "-m", "pytest", "-m", "gpu", "-q", *folders]


def script(name: str, args: argparse.Namespace, out: Path, *more: str) -> list[str]:
    words = [sys.executable, str((HERE / f"{name}.py").relative_to(machine.ROOT))]
    words += ["--device", args.device, "--out", str(out), *more]
    return [*words, "--quick"] if args.quick else words


def run_all(args: argparse.Namespace, out: Path) -> list[Step]:
    """Every step in order; what follows a failed suite is not run."""
    end = time.monotonic() + 60 * args.budget_minutes
    steps = [Step(SUITE, suite(), MINUTES[SUITE])]
    record = ("--record",) if args.record else ()
    steps.append(Step("kernels", script("kernels", args, out, *record), MINUTES["kernels"]))
    steps.append(Step("decode_step", script("decode_step", args, out), MINUTES["decode_step"]))
    steps.append(Step("serve_ab", [], 0.0))
    for step in steps:
        if step.name == SUITE and args.device == "cpu":
            step.status = "skipped: it needs a GPU"
            continue
        if step.name == "serve_ab":
            left = max(LEAST_SERVER_MINUTES, (end - time.monotonic()) / 60)
            # Its own budget is for measuring; starting and stopping servers takes a little more.
            step.command = script("serve_ab", args, out, "--budget-minutes", f"{left - 1:.1f}")
            step.minutes = left + 5
        if not step.run() and step.name == SUITE and not args.anyway:
            print("The suite failed, so nothing is measured (--anyway measures all the same).")
            break
    return steps


def document(args: argparse.Namespace, steps: list[Step]) -> dict[str, Any]:
    return {
        "machine": common.describe(args.device),
        "quick": args.quick,
        "steps": [
            {"name": step.name, "status": step.status, "seconds": step.seconds} for step in steps
        ],
    }


def main() -> int:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--budget-minutes", type=float, default=19.0, help="for all of it")
    parser.add_argument("--record", action="store_true", help="see kernels.py")
    parser.add_argument("--anyway", action="store_true", help="measure even if the suite fails")
    args = parser.parse_args()
    common.use(args, kernels=False)
    out = common.out_folder(args)
    steps = run_all(args, out)
    (out / "all.json").write_text(json.dumps(document(args, steps), indent=1) + "\n")
    for step in steps:
        print(f"{step.name:<12} {step.status:<28} {step.seconds:>6.0f} s")
    return 0 if all(s.status == "ok" or s.status.startswith("skipped") for s in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
