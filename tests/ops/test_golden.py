# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Our scores against numbers printed by the code of the papers' authors, kept in golden.json.

The input is analytic (`_input` in the file). With blocks of one token a block score is a token
score, so these entries apply now:

- `gkv.F1`, `gkv.F2`: global scores of the kept tokens, without and with history;
- `h2o.F1`: normalised local scores for a window of one query;
- `zipage.local`: local scores before normalisation (its window columns, the last 4, are not ours).

The kept sets `keep1` and `keep2` serve as inputs here: choosing them (G-KV's `Z1`) needs the
redundancy term and a choice per head, so they wait for token granularity. So do the entries
of other methods, and `gkv_mean`, whose history is a moving average."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gkv_vllm.ops import reference as ops
from gkv_vllm.policies.base import LayerView
from gkv_vllm.policies.gkv import GKV

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text())
PRINTED = 1e-5
"""One unit of the last printed digit: half of it for printing; half because the authors' float32
phases of up to 75 are off by up to 4e-6, which ours, from float64, are not."""
HEAD_DIM, WINDOW, FIRST, SECOND = 8, 4, 24, 32


def analytic(heads: int, speed: float, amplitude: float) -> Tensor:
    """X[h, t, c] = a sin(0.7 (h + 1) + 0.13 s (t + 1) (c + 1) + 0.31 s t) for 40 tokens."""
    h = torch.arange(heads, dtype=torch.float64)[:, None, None]
    t = torch.arange(40, dtype=torch.float64)[:, None]
    c = torch.arange(HEAD_DIM, dtype=torch.float64)
    phase = 0.7 * (h + 1) + 0.13 * speed * (t + 1) * (c + 1) + 0.31 * speed * t
    return (amplitude * torch.sin(phase)).float()


QUERIES = analytic(heads=4, speed=1.7, amplitude=2)
KEYS = analytic(heads=2, speed=1.1, amplitude=2)


def score(end: int, cached: Tensor, history: Tensor) -> Tensor:
    """One observation by the policy; a block being a token. cached: positions [kv_heads, tokens]"""
    view = LayerView(
        queries=QUERIES[None, :, end - WINDOW : end],
        keys=KEYS.gather(1, cached[..., None].expand(-1, -1, HEAD_DIM))[None],
        scale=1 / math.sqrt(HEAD_DIM),
        softcap=0.0,
        block_size=1,
        history=history[None],
    )
    return GKV(alpha=0.8).score(view)[0]


def first_stage() -> Tensor:
    """Scores of positions 0..23; those in the window are 0, they have none yet."""
    return score(FIRST, torch.arange(FIRST).expand(2, -1), torch.zeros(2, FIRST))


def kept(stage: str) -> Tensor:
    """Positions kept per head, without the window, which is always kept."""
    return torch.tensor(GOLDEN["gkv"][stage])[:, :-WINDOW]


def assert_printed(found: Tensor, printed: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(printed), rtol=0, atol=PRINTED)


def test_first_observation_gives_the_authors_scores() -> None:
    assert_printed(first_stage().gather(1, kept("keep1")), GOLDEN["gkv"]["F1"])


def test_second_observation_remembers_the_first() -> None:
    survivors = torch.tensor(GOLDEN["gkv"]["keep1"])
    new = torch.arange(FIRST, SECOND)
    cached = torch.cat([survivors, new.expand(2, -1)], dim=1)
    history = torch.zeros(cached.shape)
    history[:, : survivors.shape[1]] = first_stage().gather(1, survivors)
    scores = score(SECOND, cached, history)
    places = (cached[:, None, :] == kept("keep2")[:, :, None]).int().argmax(-1)
    assert_printed(scores.gather(1, places), GOLDEN["gkv"]["F2"])


def test_a_window_of_one_query_gives_h2o_scores() -> None:
    scale = 1 / math.sqrt(HEAD_DIM)
    local = ops.local_scores(QUERIES[:, FIRST - 1 : FIRST], KEYS[:, :FIRST], scale)
    positions = torch.tensor(GOLDEN["h2o"]["keep1"])[:, :-1]
    assert_printed(ops.normalise(local).gather(1, positions), GOLDEN["h2o"]["F1"])


def test_local_scores_before_normalisation_match_zipage() -> None:
    scale = 1 / math.sqrt(HEAD_DIM)
    local = ops.local_scores(QUERIES[:, FIRST - WINDOW : FIRST], KEYS[:, :FIRST], scale)
    assert_printed(local, [head[:-WINDOW] for head in GOLDEN["zipage"]["local"]])


@pytest.mark.parametrize("stage", ["keep1", "keep2"])
def test_the_golden_kept_sets_end_with_the_window(stage: str) -> None:
    end = {"keep1": FIRST, "keep2": SECOND}[stage]
    for head in GOLDEN["gkv"][stage]:
        assert head[-WINDOW:] == list(range(end - WINDOW, end))
        assert head == sorted(set(head))
