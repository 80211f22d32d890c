# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The norms of live keys against torch, with NaN in all memory that belongs to nobody."""

from __future__ import annotations

import pytest
import torch
from gkv_vllm.triton_kernels import key_norms as module
from gkv_vllm.triton_kernels.key_norms import key_norms
from torch import Tensor

from gkv_vllm.ops.paged import ReferenceOps
from tests.triton.requests import Shape, World

EPSILON = torch.finfo(torch.float32).eps
SHAPES = {
    "d64": Shape(),
    "d128_two_groups_hnd": Shape(tables=2, layers=3, head_dim=128, layout="HND"),
    "d96_5_heads_blocks_of_48": Shape(
        ((63, 0, 0), (193, 1, 2)), kv_heads=5, head_dim=96, block_size=48, dtype=torch.float16
    ),
    "d256_cpu_layout": Shape(((63, 0, 1), (64, 0, 0)), head_dim=256, layout="cpu", block_size=32),
    "odd_fp32": Shape(((62, 0, 0),), layers=1, head_dim=24, block_size=7, dtype=torch.float32),
}


def norms(world: World, request: int, shared: bool) -> tuple[Tensor, Tensor]:
    """By the kernel and in torch: [layers, kv_heads, live tokens] each."""
    ids, live = world.view(request, 1).block_ids, world.shape.requests[request][0]
    if shared:
        ids = ids[:1].expand(world.shape.layers, -1)
    expected = ReferenceOps(world.caches.layout).bind(world.caches).key_norms(ids, live)
    return key_norms(world.layers(), ids, live), expected


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_norms_are_those_of_torch(shape: Shape, device: torch.device) -> None:
    world = World(shape, device)
    for request in range(len(shape.requests)):
        found, expected = norms(world, request, shared=shape.tables == 1)
        assert found.shape == expected.shape
        # A sum of head_dim squares, its root, and torch's own error.
        torch.testing.assert_close(found, expected, rtol=shape.head_dim * EPSILON, atol=0)


def test_a_key_of_zeros_has_the_norm_zero(device: torch.device) -> None:
    world = World(SHAPES["d64"], device)
    world.caches.layout.keys(world.caches.kv_caches[1])[int(world.tables[0, 0, 0]), :, 3] = 0
    found, _ = norms(world, 0, shared=True)
    assert (found[1, :, 3] == 0).all()
    assert (found[0, :, 3] > 0).all()


def test_all_tiles_of_a_long_request_are_stored(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = module._sizes
    monkeypatch.setattr(module, "_sizes", lambda *shape: sizes(*shape) | {"KEYS": 16})
    found, expected = norms(World(SHAPES["d64"], device), 2, shared=True)
    torch.testing.assert_close(found, expected, rtol=64 * EPSILON, atol=0)


def test_refusals_say_what_does_not_fit(device: torch.device) -> None:
    world = World(SHAPES["d64"], device)
    ids, layers = world.view(0, 1).block_ids, world.layers()
    for wrong, live in ((ids.int(), 63), (ids[:1], 63), (ids, 65), (ids[0], 63)):
        with pytest.raises(ValueError, match="key_norms: block_ids must be int64 \\[2, blocks\\]"):
            key_norms(layers, wrong, live)
