# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Tests of the GPU suite that Triton's interpreter can run, where there is no GPU.

vLLM's own kernels take part in them, for which its Triton needs a backend for the CPU: so they run
in a process of their own (see tests/triton_cpu)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from ..e2e.recorded import RUNNERS

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the suite itself runs here: pytest -m gpu")
@pytest.mark.parametrize("name", ["test_live_attention", "test_decode_graph"])
def test_every_test_passes_in_the_interpreter(name: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"),
            *(f"--junitxml={report}", f"tests/gpu/{name}.py"),
        ],
        cwd=ROOT,
        env={**os.environ, **RUNNERS["V2"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot()[0]
    assert int(suite.get("tests", 0)) > 0
    assert suite.get("skipped") == "0", done.stdout[-6000:]
