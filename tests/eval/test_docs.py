# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The tables of docs/evaluation.md are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gkv_vllm.eval import report

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["policies", "granularity"])
def test_the_page_shows_the_committed_results(name):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    shown = page.split(f"<!-- begin {name} -->\n")[1].split(f"\n<!-- end {name} -->")[0]
    results = ROOT / "benchmarks" / "results" / "cpu" / "eval" / name / "report.json"
    assert shown == report.summary(json.loads(results.read_text()))
