# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""How many blocks a request may hold, in numbers that can be checked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkv_vllm.config import RequestPolicy
from gkv_vllm.engine.footprint import (
    bounded_blocks,
    due_tokens,
    peak_blocks,
    protected_blocks,
    slot_count,
)


@pytest.mark.parametrize(
    ("protect", "prompt_tokens", "expected"),
    [
        ("prompt", 0, 0),
        ("prompt", 1, 1),
        ("prompt", 16, 1),
        ("prompt", 17, 2),
        ("prompt", 63, 4),
        ("sinks", 1, 1),
        ("sinks", 63, 1),
        ("none", 63, 0),
    ],
)
def test_protected_blocks(protect: str, prompt_tokens: int, expected: int) -> None:
    assert protected_blocks(protect, prompt_tokens, 16) == expected


@pytest.mark.parametrize(
    ("budget", "interval", "expected"), [(64, 16, 80), (63, 16, 80), (65, 1, 81)]
)
def test_due_at_budget_in_whole_blocks_plus_interval(
    budget: int, interval: int, expected: int
) -> None:
    assert due_tokens(budget, interval, 16) == expected


def test_bound_is_the_last_token_before_due_plus_what_is_in_flight() -> None:
    # 79 tokens are not due; one step of 1 token makes 80 tokens, 5 blocks.
    assert bounded_blocks(2, 80, 1, 16) == 2 + 5
    assert bounded_blocks(2, 80, 2, 16) == 2 + 6
    assert bounded_blocks(0, 80, 64, 16) == 9


def peak(evict: bool = True, protect: str = "prompt", **changed: int) -> int:
    numbers = {
        "prompt_tokens": 63,
        "max_tokens": 1000,
        "block_size": 16,
        "interval": 16,
        "in_flight_tokens": 1,
    }
    return peak_blocks(RequestPolicy(evict, 64, protect), **{**numbers, **changed})


def test_peak_of_an_evicting_request_does_not_grow_with_its_length() -> None:
    assert peak() == peak(max_tokens=10**6) == 4 + 5


def test_peak_of_a_short_request_is_its_length() -> None:
    assert peak(max_tokens=1) == 4
    assert peak(prompt_tokens=1, max_tokens=16) == 2


def test_peak_of_a_request_that_opted_out_is_its_length() -> None:
    assert peak(evict=False) == -(-1063 // 16)


def test_peak_protects_what_is_asked_for() -> None:
    assert peak(protect="none") + 4 == peak(protect="sinks") + 3 == peak()


@given(
    protected=st.integers(0, 50),
    due=st.integers(1, 500),
    tokens=st.integers(1, 500),
    block_size=st.sampled_from([1, 4, 16, 63]),
)
def test_bound_holds_any_unprotected_part_that_can_arise(
    protected: int, due: int, tokens: int, block_size: int
) -> None:
    bound = bounded_blocks(protected, due, tokens, block_size)
    assert (bound - protected) * block_size >= due - 1 + tokens
    assert (bound - protected - 1) * block_size < due - 1 + tokens


@pytest.mark.parametrize(
    ("requests", "blocks", "budget", "expected"),
    [(256, 319, 64, 79), (8, 319, 64, 8), (256, 3, 64, 1), (256, 0, 64, 1), (256, 319, 10, 256)],
)
def test_slots_suffice_for_requests_that_fit_in_the_pool(
    requests: int, blocks: int, budget: int, expected: int
) -> None:
    assert slot_count(requests, blocks, budget, 16) == expected
