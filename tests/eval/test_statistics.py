# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The statistics against cases whose answers are known."""

import numpy as np
import pytest

from gkv_vllm.eval.statistics import compare, holm, per_text, ratio, share


def test_equal_lists_differ_by_nothing():
    found = compare([0.5, 1.0, 0.0], [0.5, 1.0, 0.0])
    assert (found.difference, found.wins, found.ties, found.losses) == (0.0, 0, 3, 0)
    assert found.p_value == 1.0


def test_the_p_value_is_that_of_all_sign_flips():
    # Ten pairs, all better: of 2^10 sign patterns only two are as extreme.
    found = compare([1.0] * 10, [0.0] * 10)
    assert found.p_value == pytest.approx(2 / 1024, abs=1.5e-3)
    assert (found.low, found.high) == (1.0, 1.0)


def test_two_wins_alone_prove_nothing():
    assert compare([1.0, 1.0, 0.5], [0.0, 0.0, 0.5]).p_value > 0.3


def test_pairing_takes_out_what_prompts_have_in_common():
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 1, 64)
    found = compare(hard + 0.1 + rng.normal(0, 0.02, 64), hard)
    assert found.p_value < 0.01 and found.low > 0.05


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(100):
        sample = rng.binomial(10, 0.7, 40)
        found = share(sample / 10, seed=trial)
        covered += found.low <= 0.7 <= found.high
    assert covered >= 86


def test_a_share_is_the_mean_over_texts():
    assert share([0.5, 1.0]).value == 0.75
    assert np.isnan(share([]).value)


def test_holm_asks_more_of_many_tests():
    assert holm([0.04]) == [True]
    assert holm([0.04, 0.03]) == [False, False]
    assert holm([0.2, 0.001, 0.02]) == [False, True, True]
    # A small p after one that failed does not count.
    assert holm([0.03, 0.03, 0.001]) == [False, False, True]


def test_far_answers_are_those_of_texts_that_have_any():
    texts = [
        {"seed": 1, "right": 5, "answers": 5, "right_far": 1, "answers_far": 2},
        {"seed": 2, "right": 5, "answers": 5, "right_far": 0, "answers_far": 0},
    ]
    assert per_text(texts, far=True) == {1: 0.5}


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="equal lists"):
        compare([1.0], [1.0, 2.0])


def test_a_text_without_answers_has_none_right():
    assert per_text([{"seed": 3, "right": 0, "answers": 0}]) == {3: 0.0}


def test_a_ratio_is_paired_by_text():
    full, half = [0.2, 0.4, 1.0, 0.8], [0.1, 0.2, 0.5, 0.4]
    found = ratio(half, full)
    # Whatever texts are drawn, half of each is half of all.
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    wide = ratio([0.0, 1.0] * 8, [1.0] * 16)
    assert wide.value == 0.5 and 0.2 < wide.low < 0.4 < 0.6 < wide.high < 0.8


def test_a_share_of_nothing_is_no_number():
    assert np.isnan(ratio([0.0, 0.0], [0.0, 0.0]).value) and np.isnan(ratio([], []).low)
    with pytest.raises(ValueError, match="equal lists"):
        ratio([1.0], [1.0, 2.0])
