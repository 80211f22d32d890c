# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The tables of docs/evaluation.md are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gkv_vllm.eval import report

ROOT = Path(__file__).parents[2]


PAGE = (ROOT / "docs" / "evaluation.md").read_text()
TABLES = re.findall(r"<!-- begin ([a-z-]+)-(\d+) -->\n(.*?)\n<!-- end", PAGE, re.DOTALL)


def results(name: str) -> list[dict[str, Any]]:
    path = ROOT / "benchmarks" / "results" / "cpu" / "eval" / name / "report.json"
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("name", "budget", "shown"), TABLES, ids=[f"{n}-{b}" for n, b, _ in TABLES]
)
def test_the_page_shows_the_committed_results(name: str, budget: str, shown: str) -> None:
    assert shown == report.summary(results(name), int(budget))


def test_every_committed_result_is_on_the_page() -> None:
    folders = (ROOT / "benchmarks" / "results" / "cpu" / "eval").glob("*/report.json")
    assert {path.parent.name for path in folders} == {name for name, _, _ in TABLES}


def test_the_readme_shows_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text()
    shown = readme.split("<!-- begin forgotten -->\n")[1].split("\n<!-- end forgotten -->")[0]
    found = [
        row
        for row in (*results("restated"), *results("spans"), *results("policies"))
        if row["budget"] == 384
    ]
    rows = {(row["server"], row["exam"]): row for row in found}
    exams = ("once-3", "once-10", "copyback-40", "ledger", "trace")
    for line in shown.splitlines()[2:]:
        server, *cells = (cell.strip(" *`") for cell in line.strip("|").split("|"))
        server = server.split("`")[0]
        assert cells == [f"{rows[server, exam]['of_full']:.2f}" for exam in exams]
