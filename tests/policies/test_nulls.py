# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The null policies: what `recency` and `random` keep, and on what a random draw depends."""

from collections import Counter

import pytest

from gkv_vllm.policies.base import RankView
from gkv_vllm.policies.random import Random
from gkv_vllm.policies.recency import Recency

BLOCKS = [3, 4, 9, 10, 11]


def draw(*, seed: int = 0, key: int = 7, event: int = 0) -> list[float]:
    return list(Random(seed=seed).rank(RankView(key=key, event=event, blocks=BLOCKS)))


def test_recency_ranks_newer_blocks_higher() -> None:
    ranks = Recency().rank(RankView(key=0, event=0, blocks=BLOCKS))
    assert list(ranks) == sorted(ranks)
    assert len(set(ranks)) == len(BLOCKS)


def test_recency_does_not_depend_on_the_request() -> None:
    views = [RankView(key=key, event=event, blocks=BLOCKS) for key in (0, 1) for event in (0, 5)]
    assert len({tuple(Recency().rank(view)) for view in views}) == 1


def test_random_repeats_for_the_same_request() -> None:
    assert draw() == draw()


@pytest.mark.parametrize("changed", [{"seed": 1}, {"key": 8}, {"event": 1}])
def test_random_depends_on_seed_request_and_event(changed: dict[str, int]) -> None:
    assert draw(**changed) != draw()


def test_random_draws_do_not_disturb_each_other() -> None:
    first = draw()
    for other in range(20):
        draw(key=other)
    assert draw() == first


def test_random_is_uniform_over_blocks() -> None:
    draws = 4000
    worst: Counter[int] = Counter()
    for key in range(draws):
        ranks = draw(key=key)
        worst[BLOCKS[ranks.index(min(ranks))]] += 1
    expected = draws / len(BLOCKS)
    # Six standard deviations of a binomial count.
    tolerance = 6 * (expected * (1 - 1 / len(BLOCKS))) ** 0.5
    assert all(abs(worst[block] - expected) < tolerance for block in BLOCKS)


@pytest.mark.parametrize("policy", [Recency(), Random()])
def test_null_policies_need_no_queries_and_rank_every_block(policy: Recency | Random) -> None:
    assert policy.needs_queries is False
    assert len(policy.rank(RankView(key=1, event=2, blocks=BLOCKS))) == len(BLOCKS)
    assert list(policy.rank(RankView(key=1, event=2, blocks=[]))) == []
