# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The selection by threshold, against the torch reference: ties, signs and tiles."""

from __future__ import annotations

import pytest
import torch
from gkv_vllm.triton_kernels import topk as module
from gkv_vllm.triton_kernels.topk import topk_keep
from torch import Tensor

from gkv_vllm.ops import topk as oracle


def check(scores: Tensor, count: int, device: torch.device) -> None:
    kept = topk_keep(scores.to(device), count)
    assert torch.equal(kept.cpu(), oracle.topk_keep(scores, count))


@pytest.mark.parametrize("units", [1, 2, 63, 64, 130])
def test_the_best_stay_and_of_equals_the_newest(
    units: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_tile", lambda units: 64)
    generator = torch.Generator().manual_seed(units)
    kinds = {
        "distinct": torch.randn(units, generator=generator),
        "few_values": torch.randint(-2, 3, (units,), generator=generator).float(),
        "all_equal": torch.full((units,), -0.25),
        "signed_zeros": torch.randint(0, 2, (units,), generator=generator) * -0.0,
        "far_apart": torch.randn(units, generator=generator) * 1e38 * 1e-30 ** torch.rand(units),
    }
    kinds["signed_zeros"][::2] = 0.0
    scores = torch.stack(list(kinds.values()))
    scores[-1, :1] = torch.inf
    scores[-1, 1:3] = -torch.inf
    for count in sorted({1, units // 3, units}):
        check(scores, count, device)


def test_neighbouring_floats_are_told_apart(device: torch.device) -> None:
    ones = torch.ones(8)
    scores = torch.stack([ones, -ones, ones * 1e-45, torch.zeros(8)])
    scores[:, 3] = torch.nextafter(scores[:, 3], torch.tensor(torch.inf))
    scores[:, 5] = torch.nextafter(scores[:, 5], torch.tensor(-torch.inf))
    for count in range(9):
        check(scores, count, device)


@pytest.mark.parametrize(("units", "count"), [(511, 64), (513, 512), (4097, 100)])
def test_tiles_that_ship(units: int, count: int, device: torch.device) -> None:
    check(torch.randn(1, 2, units).mul(8).round(), count, device)


def test_rows_keep_their_shape_and_need_not_be_dense(device: torch.device) -> None:
    scores = torch.randn(40, 3, 2).permute(2, 1, 0)
    check(scores, 7, device)
    assert topk_keep(scores.to(device), 0).shape == (2, 3, 0)
    assert topk_keep(scores[:0].to(device), 5).shape == (0, 3, 5)


def test_refusals_say_why(device: torch.device) -> None:
    scores = torch.zeros(2, 4, device=device)
    for count in (-1, 5):
        with pytest.raises(ValueError, match=f"cannot keep {count} of 4 units"):
            topk_keep(scores, count)
    with pytest.raises(ValueError, match="scores must be float32"):
        topk_keep(scores.half(), 2)
