# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Every GPU benchmark runs on a CPU with tiny shapes, and says that it measured nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def smoke(name: str, folder: Path, *more: str) -> dict[str, Any]:
    """What a benchmark writes; its plot is there too."""
    command = [sys.executable, f"benchmarks/gpu/{name}.py", "--quick", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(folder), *more], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / f"{name}.png").stat().st_size > 0
    numbers = json.loads((folder / f"{name}.json").read_text())
    assert numbers["quick"] and numbers["machine"]["device"] == "cpu"
    return numbers


def test_kernels_agree_with_their_oracles(tmp_path: Path) -> None:
    rows = smoke("kernels", tmp_path)["rows"]
    # Numbers up to 1 in float32, summed over at most 96 tokens.
    close = {"score_tokens", "score_blocks", "mix_scores"}
    close |= {"redundancy, keys alike", "redundancy, none alike", "superseded"}
    most = dict.fromkeys(close, 96 * 2**-23)
    most |= {"key_norms": 2**-16, "attention_mass": 2**-16}  # up to 64, of as many numbers
    exact = {"topk_keep", "prepare_step", "store_window_queries", "compact"}
    most |= dict.fromkeys(exact, 0)
    alone = [row for row in rows if row["requests"] == 1 and row["operator"] != "event"]
    assert {row["operator"] for row in alone} == {*most}
    assert {row["live_tokens"] for row in alone} == {64, 96}
    for row in alone:
        assert row["largest_difference"] <= most[row["operator"]], row
    assert "event" in {row["operator"] for row in rows}


def test_a_policy_with_nothing_to_do_decodes_what_stock_decodes(tmp_path: Path) -> None:
    numbers = smoke("decode_step", tmp_path)
    (case,) = numbers["cases"]
    assert case["idle_tokens_are_stocks"] and numbers["attention"] == "TRITON_ATTN"
    assert case["modes"]["evicting"]["events"] >= case["requests"]


@pytest.mark.e2e
@pytest.mark.parametrize("weights", [(), ("--dummy",)], ids=["demo", "dummy"])
def test_both_servers_finish_every_request(tmp_path: Path, weights: tuple[str, ...]) -> None:
    numbers = smoke("serve_ab", tmp_path, "--budget-minutes", "5", *weights)
    for side in numbers["sides"].values():
        for level in side["levels"]:
            assert level["requests_done"] == level["concurrency"] and not level["cut"]
            assert level["tokens"] == level["concurrency"] * numbers["settings"]["tokens"]
    most = {side: of["levels"][-1] for side, of in numbers["sides"].items()}
    assert most["stock"]["evictions"] == 0 < most["policy"]["evictions"]
    assert [row["memory"] for row in numbers["comparison"]] == ["ample", "memory-bound"]
