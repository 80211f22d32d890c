# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The null policy that forgets at random; any score has to beat it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    draws for all heads of the model, and takes what its own got.

    `redraw` draws anew at each eviction: a token that survives each with probability p is there
    after k of them with p^k, so old tokens are rare. Without it a token has one number for its
    life, and what stays is a uniform sample of all that ever competed (reservoir sampling)."""

    seed: int = 0
    redraw: bool = True

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return Needs(seeded=True, history=not self.redraw)

    def update(self, view: View) -> Tensor:
        assert view.history is not None
        return torch.where(view.is_new(), self._draw(view), view.history)

    def score(self, view: View) -> Tensor:
        if self.redraw:
            return self._draw(view)
        assert view.history is not None
        return view.history

    def _draw(self, view: View) -> Tensor:
        caches = view.ops.caches
        shape = (view.num_layers, caches.model_heads or view.kv_heads, view.num_units)
        of_model = draw(view, self.seed, shape)
        return of_model.narrow(1, caches.first_head, view.kv_heads).to(view.device)
