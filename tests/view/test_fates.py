# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What pictures show is what the record says, in every form of a kept set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gkv_vllm.record import RecordError, read_record
from gkv_vllm.view import keepmap
from gkv_vllm.view.fates import NEVER, NO_RANK, Fates, fates_of

from .drawn import Drawn, draw

FORMS: dict[str, dict[str, Any]] = {
    "head": {"scope": "head"},
    "layer": {"scope": "layer"},
    "all": {"scope": "all"},
    "blocks": {"granularity": "block"},
    "preempted": {"preempted_before": 3},
    "preempted blocks": {"granularity": "block", "preempted_before": 1},
}


@pytest.fixture(params=FORMS)
def drawn(request: pytest.FixtureRequest, tmp_path: Path) -> Drawn:
    return draw(tmp_path, **FORMS[request.param])


@pytest.fixture
def fates(drawn: Drawn) -> Fates:
    return fates_of(read_record(drawn.path))


def test_each_head_holds_what_the_record_says(drawn: Drawn, fates: Fates) -> None:
    for (event, layer, head), held in drawn.held.items():
        of_head = fates.kept(event)[layer * drawn.header.kv_heads + head]
        assert set(np.flatnonzero(of_head[: drawn.computed[event]])) == held


def test_each_token_is_lost_in_its_event(drawn: Drawn, fates: Fates) -> None:
    for (event, layer, head), lost in drawn.lost.items():
        row = layer * drawn.header.kv_heads + head
        of_epoch = fates.left[fates.events[event]["epoch"], row]
        assert set(np.flatnonzero(of_epoch == event)) == lost
    assert set(fates.left.ravel()) <= {*range(len(fates.events)), NEVER}


def test_scores_are_means_over_the_sets_in_which_a_token_competed(
    drawn: Drawn, fates: Fates
) -> None:
    expected = np.full(fates.scores.shape, np.nan)
    for (event, position), scores in drawn.scores.items():
        expected[event, position] = np.mean(scores)
    np.testing.assert_allclose(fates.scores, expected, rtol=1e-5, atol=1e-6)


def test_ranks_count_who_scored_lower(fates: Fates) -> None:
    for ranks, scores in zip(fates.ranks(), fates.scores, strict=True):
        competed = [s for s in scores if not np.isnan(s)]
        for rank, score in zip(ranks, scores, strict=True):
            if np.isnan(score):
                assert rank == NO_RANK
            else:
                below = sum(other < score for other in competed)
                assert rank == round(254 * below / (len(competed) - 1))


def test_the_states_of_a_keepmap_are_those_of_the_record(drawn: Drawn, fates: Fates) -> None:
    for (event, layer, head), held in drawn.held.items():
        row = keepmap.states(fates, event)[layer * drawn.header.kv_heads + head]
        named = [keepmap.STATES[state] for state in row]
        computed, numbers = drawn.computed[event], fates.events[event]
        assert {i for i, s in enumerate(named) if s in ("kept", "protected", "recent")} == held
        assert {i for i, s in enumerate(named) if s == "evicted now"} == drawn.lost[
            event, layer, head
        ]
        assert named.count("protected") == numbers["protected"]
        assert named[computed:] == ["not computed"] * (fates.tokens - computed)


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_a_token_that_the_record_does_not_have_is_refused(tmp_path: Path, granularity: str) -> None:
    # The second event is about tokens up to the 28th.
    short = draw(tmp_path, token_ids=[7] * 27, granularity=granularity)
    with pytest.raises(RecordError, match="event 1 names a token beyond the 27 it has"):
        fates_of(read_record(short.path))
