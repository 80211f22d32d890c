# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Copying window queries into the rings, against the torch reference."""

from __future__ import annotations

import pytest
import torch
from gkv_vllm.triton_kernels.window_queries import store_window_queries

from gkv_vllm.ops.paged import ReferenceOps
from tests.triton.requests import NAN

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(5, 64), (14, 96), (32, 128), (33, 256)])
def test_only_recorded_queries_are_stored(
    heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(heads)
    queries = torch.randn(9, heads, head_dim, generator=generator).to(dtype).to(device)
    places = torch.tensor([-1, 7, 0, -1, -1, 20, 3, -1, 4, 99, -1], dtype=torch.int32)
    ring = torch.full((21, heads, head_dim), NAN, dtype=dtype, device=device)
    expected = ring.clone()
    ReferenceOps().store_window_queries(queries, places.to(device), expected)
    store_window_queries(queries, places.to(device), ring)
    assert torch.equal(ring.nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("gap", [0, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_may_be_part_of_a_fused_projection(
    gap: int, dtype: torch.dtype, device: torch.device
) -> None:
    heads, head_dim = 6, 64
    fused = torch.full((4, heads + 4, head_dim + gap), NAN, dtype=dtype, device=device)
    queries = fused[:, 1 : 1 + heads, gap:]
    queries.copy_(torch.randn(queries.shape))
    places = torch.tensor([2, -1, 0, 1], dtype=torch.int32, device=device)
    ring = torch.full((3, heads, head_dim), NAN, dtype=dtype, device=device)
    store_window_queries(queries, places, ring)
    assert torch.equal(ring, queries[[2, 3, 0]])


def test_bits_are_copied_not_converted(device: torch.device) -> None:
    for dtype, bits in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32)):
        size = torch.iinfo(bits)
        drawn = torch.randint(size.min, size.max, (3, 2, 64), dtype=bits, device=device)
        drawn[0, 0, :2] = torch.tensor([-1, size.max], dtype=bits)  # NaNs with payloads
        ring = torch.zeros(3, 2, 64, dtype=dtype, device=device)
        places = torch.arange(3, dtype=torch.int32, device=device)
        store_window_queries(drawn.view(dtype), places, ring)
        assert torch.equal(ring.view(bits), drawn)


def test_refusals_name_the_argument(device: torch.device) -> None:
    queries = torch.zeros(3, 2, 64, device=device)
    places = torch.zeros(3, dtype=torch.int32, device=device)
    ring = torch.zeros(8, 2, 64, device=device)
    for bad in (ring[:, :1], ring.half(), torch.zeros(8, 4, 64, device=device)[:, :2]):
        with pytest.raises(ValueError, match="ring must be"):
            store_window_queries(queries, places, bad)
    with pytest.raises(ValueError, match="places must have at least 3"):
        store_window_queries(queries, places[:2], ring)
    with pytest.raises(ValueError, match="places must be contiguous int32"):
        store_window_queries(queries, places.long(), ring)
    with pytest.raises(ValueError, match="queries must be"):
        store_window_queries(queries.transpose(1, 2), places, ring)
