# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The null policy that forgets at random; any score has to beat it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from gkv_vllm.policies.base import Needs, Policy
from gkv_vllm.policies.registry import register_policy

if TYPE_CHECKING:
    from torch import Tensor

    from gkv_vllm.policies.view import View


def draw(view: View, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers on the CPU: the same for the same request, eviction and seed."""
    key = zlib.crc32(f"{seed}:{view.key}:{view.event}".encode())
    return torch.rand(shape, generator=torch.Generator().manual_seed(key))


@register_policy("random")
@dataclass(frozen=True)
class Random(Policy):
    """Keeps what is protected and a uniform draw of the rest (arXiv 2609.03430).

    Every layer and KV head draws for itself, unless they share a kept set. The draw depends on the
    seed, the request and the number of its evictions, and on nothing else: the same request loses
    the same tokens in whatever company it runs, and over however many tensor-parallel ranks: each
    draws for all heads of the model, and takes what its own got."""

    needs: ClassVar[Needs] = Needs(seeded=True)

    seed: int = 0

    def score(self, view: View) -> Tensor:
        caches = view.ops.caches
        shape = (view.num_layers, caches.model_heads or view.kv_heads, view.num_units)
        of_model = draw(view, self.seed, shape)
        return of_model.narrow(1, caches.first_head, view.kv_heads).to(view.device)
