# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Fixtures that every test may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# As in the Makefile, so that a bare pytest does the same.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Before torch is imported. With more threads than free cores, OpenMP's busy waiting makes the
# in-process engine twenty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Under pytest-xdist several engines run at once, and vLLM would bind all of them to the same core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

# Triton's decorators read this when they are first imported, which vLLM does. It runs no Triton
# kernel on a CPU by itself, so only the tests of ours are interpreted.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The seeded demo model; made when it is missing (seconds, no download)."""
    path = ROOT / "build" / "demo-model"
    if not (path / "config.json").exists():
        subprocess.run([sys.executable, ROOT / "scripts" / "make_demo_model.py"], check=True)
    return path
