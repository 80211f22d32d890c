# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The options of gkv that the paper lacks: spans, values, what is said again, a share drawn."""

from __future__ import annotations

import pytest
import torch

from gkv_vllm.ops.reference import restated, superseded
from gkv_vllm.policies.gkv import GKV

from .test_identities import EPS, at_eviction, granularities, implementations, models


@models
@granularities
@pytest.mark.parametrize("redundancy", ["exact", "none"])
def test_a_share_is_drawn_and_the_rest_is_the_best_of_what_is_left(model, moves_tokens, redundancy):
    view, plain = at_eviction(GKV(redundancy=redundancy), model, moves_tokens)
    _, mixed = at_eviction(GKV(redundancy=redundancy, random_share=0.5), model, moves_tokens)
    drawn = mixed > plain + 1
    assert (drawn == drawn[:1, :1]).all()  # the same for all layers and heads
    assert (drawn.sum(-1) == round(0.5 * view.keep)).all()
    assert torch.equal(mixed[~drawn], plain[~drawn])


@models
def test_the_draw_is_new_at_each_eviction(model):
    shown = []
    for event in (0, 1):
        _, plain = at_eviction(GKV(), model, event=event)
        _, mixed = at_eviction(GKV(random_share=0.5), model, event=event)
        shown.append((mixed > plain + 1)[0, 0])
    first, second = shown
    assert not torch.equal(first, second[: len(first)])


@models
def test_a_draw_stays_out_of_the_history(model):
    """Or what was drawn once would never go."""
    _, plain = at_eviction(GKV(redundancy="none"), model, event=1)
    view, mixed = at_eviction(GKV(redundancy="none", random_share=0.9), model, event=1)
    assert plain.max() <= 1 and view.history.max() <= 1


@models
@granularities
@implementations
def test_values_weigh_the_importance(model, moves_tokens, implementation):
    view, plain = at_eviction(
        GKV(score_weight=1.0), model, moves_tokens, implementation=implementation
    )
    _, weighed = at_eviction(
        GKV(score_weight=1.0, value_power=2.0), model, moves_tokens, implementation=implementation
    )
    norms = view.ops.values(view.block_ids, view.live_tokens).norm(dim=-1)
    norms = norms[..., : view.live_tokens - view.window]
    units = norms[..., view.protected : view.protected + view.num_candidates]
    units = units.unflatten(-1, (-1, view.unit)).amax(-1)
    expected = plain * (units / norms.mean(-1, keepdim=True)) ** 2
    expected = expected / expected.amax(-1, keepdim=True)
    torch.testing.assert_close(weighed, expected, rtol=0, atol=32 * EPS)


def test_the_largest_cosine_to_a_newer_key():
    right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    keys = torch.stack([right, 2 * up, 3 * right, right + up, -right])
    half = 0.5**0.5
    # The newest has nothing after it, and what only its opposite follows is not superseded.
    torch.testing.assert_close(superseded(keys), torch.tensor([1.0, half, half, 0.0, 0.0]))


@models
@granularities
@implementations
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_what_a_newer_key_resembles_counts_less(model, moves_tokens, implementation, weight):
    view, plain = at_eviction(
        GKV(redundancy="none"), model, moves_tokens, implementation=implementation
    )
    _, weighed = at_eviction(
        GKV(score_weight=weight, redundancy="superseded"), model, moves_tokens,
        implementation=implementation,
    )  # fmt: skip
    keys = view.keys().double()[..., view.protected :, :]
    unit = keys / keys.norm(dim=-1, keepdim=True)
    cosines = (unit @ unit.mT).triu(1).amax(-1)[..., : view.num_candidates]
    expected = cosines.unflatten(-1, (-1, view.unit)).mean(-1)
    torch.testing.assert_close(
        weighed.double(), weight * plain - (1 - weight) * expected, rtol=0, atol=64 * EPS
    )


def test_a_passage_is_restated_as_surely_as_its_least_part():
    cosines = torch.tensor([[0.9, 1.0, 0.8, 0.6, 1.0, 0.2, 1.0, 1.0]])
    found = restated(cosines, 0.6)
    expected = torch.tensor([[0.75, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    torch.testing.assert_close(found, expected)


@models
@granularities
@implementations
@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("in_a_block", [0, 31], ids=["window_follows", "some_tokens_between"])
def test_what_is_said_again_as_a_passage_counts_less(
    model, moves_tokens, implementation, weight, in_a_block
):
    """The neighbour of the last candidate may be of the window."""
    settings = {"score_weight": weight, "temperature": 0.5}
    when = {"implementation": implementation, "tokens": 160 + in_a_block + model.window}
    view, plain = at_eviction(GKV(**settings), model, moves_tokens, **when)
    _, less = at_eviction(GKV(**settings, restated=0.2), model, moves_tokens, **when)
    assert view.live_tokens - model.window == 160 + in_a_block
    keys = view.keys().double()[..., view.protected :, :]
    unit = keys / keys.norm(dim=-1, keepdim=True)
    cosines = (unit @ unit.mT).triu(1).amax(-1)
    tokens = cosines.shape[-1]
    again = [
        ((cosines[..., max(0, i - 1) : min(tokens, i + 2)].amin(-1) - 0.2) / 0.8).clamp_min(0)
        for i in range(view.num_candidates)
    ]
    expected = torch.stack(again, -1).unflatten(-1, (-1, view.unit)).mean(-1)
    assert expected.amax() > expected.amin() + 0.05
    torch.testing.assert_close(
        less.double(), plain.double() - (1 - weight) * expected, rtol=0, atol=64 * EPS
    )


@models
def test_what_is_around_lifts_what_is_restated(model):
    """Of a passage that is worth keeping no part goes because it was said again."""
    _, alone = at_eviction(GKV(restated=0.4), model)
    _, lifted = at_eviction(GKV(restated=0.4, span=5), model)
    near = torch.nn.functional.avg_pool1d(
        alone.flatten(0, 1)[:, None], 5, 1, 2, count_include_pad=False
    ).view(alone.shape)
    torch.testing.assert_close(lifted, torch.maximum(alone, near), rtol=0, atol=16 * EPS)


@models
@implementations
def test_a_token_is_worth_as_much_as_its_neighbours_are_on_average(model, implementation):
    _, alone = at_eviction(GKV(), model, implementation=implementation)
    _, lifted = at_eviction(GKV(span=5), model, implementation=implementation)
    expected = alone.clone()
    for unit in range(alone.shape[-1]):
        near = alone[..., max(0, unit - 2) : unit + 3]  # beyond the ends there are none
        expected[..., unit] = torch.maximum(alone[..., unit], near.mean(-1))
    torch.testing.assert_close(lifted, expected, rtol=0, atol=16 * EPS)
    assert (lifted > alone).any()


@models
def test_whole_blocks_are_left_as_they_are(model):
    _, alone = at_eviction(GKV(), model, moves_tokens=False)
    _, lifted = at_eviction(GKV(span=5), model, moves_tokens=False)
    assert torch.equal(lifted, alone)


@models
@granularities
@pytest.mark.parametrize("event", [0, 1])
def test_the_variant_of_spans_is_its_settings(model, moves_tokens, event):
    by_name = GKV(variant="spans")
    by_settings = GKV(history="sum", score_weight=0.1, span=9)
    _, named = at_eviction(by_name, model, moves_tokens, event=event)
    _, set_ = at_eviction(by_settings, model, moves_tokens, event=event)
    assert torch.equal(named, set_)
    _, unlike = at_eviction(GKV(variant="spans", history="max"), model, moves_tokens, event=event)
    assert torch.equal(named, unlike) == (event == 0)  # what a sum and a maximum have begun with


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"restated": -0.1}, "restated must lie between 0 and 1, got -0.1"),
        ({"variant": "zipage", "restated": 0.8}, "restated does not go with variant 'zipage'"),
        ({"span": 4}, "span must be a positive odd number of tokens, got 4"),
        ({"random_share": 1.5}, "random_share must lie between 0 and 1"),
        ({"value_power": -1.0}, "value_power must be 0 or more"),
    ],
)
def test_bad_options_are_refused(parameters, sentence):
    with pytest.raises(ValueError, match=sentence):
        GKV(**parameters)


def test_only_a_draw_asks_for_a_number_of_the_request():
    assert GKV(random_share=0.1).needs.seeded
    assert not GKV().needs.seeded  # it costs a pass over every prompt


def test_options_keep_off_the_path_that_knows_only_the_formula():
    assert GKV().global_score() is not None
    assert GKV(random_share=0.1).global_score() is None
    assert GKV(value_power=1.0).global_score() is None
    assert GKV(history="mean").global_score() is None
    assert GKV(variant="spans", redundancy="superseded").global_score() is None
    formula = GKV(variant="spans").global_score()
    assert formula is not None and (formula.history, formula.span) == ("sum", 9)
    formula = GKV(restated=0.8).global_score()
    assert formula is not None and formula.restated == 0.8
    assert GKV().restated == 1.0  # which no cosine is above: off
