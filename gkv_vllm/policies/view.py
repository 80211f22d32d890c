# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What a policy sees of one request that has to lose tokens; reads the cache, changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gkv_vllm.ops import reference

if TYPE_CHECKING:
    from gkv_vllm.ops.layers import LayerOps


@dataclass(frozen=True, kw_only=True)
class View:
    """One request in all its layers.

    Its live tokens, in order, are: `protected` ones that never go, then `num_candidates` of which
    some go, then the recent ones, the last `window` of which made the queries. What the methods
    return per token is [layers, kv_heads, live_tokens - window] in float32, oldest first."""

    ops: LayerOps
    block_ids: Tensor
    """[layers, live_blocks] int64: the request's live blocks in logical order, in each layer."""
    queries: Tensor | None
    """[layers, query_heads, window, head_dim], oldest first; rotated, as attention saw them."""
    history: Tensor | None
    """[layers, kv_heads, units] float32: 0 for units that are new since the last eviction."""
    scale: float
    """Softmax scale of the attention layers."""
    softcap: float
    """Logit soft cap of the attention layers; 0 for none."""
    window: int
    live_tokens: int
    protected: int
    num_candidates: int
    keep: int
    """How many units stay."""
    remembered: int
    """How many leading units have a history; the others are scored for the first time."""
    block_size: int
    unit: int
    """Tokens per unit: 1, or `block_size` with block granularity."""
    event: int
    """How many evictions this request has had since it last started from its prompt."""
    key: int
    """Seeds draws: the same for the same prompt and seed."""

    @property
    def num_units(self) -> int:
        return self.num_candidates // self.unit

    @property
    def kv_heads(self) -> int:
        return self.ops.caches.kv_heads

    @property
    def num_layers(self) -> int:
        return self.ops.caches.num_layers

    @property
    def device(self) -> torch.device:
        return self.ops.caches.device

    def order(self) -> Tensor:
        """The units from old to new, 0, 1, ...: [layers, kv_heads, units] float32."""
        places = torch.arange(self.num_units, dtype=torch.float32, device=self.device)
        return places.repeat(self.num_layers, self.kv_heads, 1)

    def is_new(self) -> Tensor:
        """Which units are scored for the first time: [units] bool."""
        return torch.arange(self.num_units, device=self.device) >= self.remembered

    # ---- per token: [layers, kv_heads, live_tokens - window]

    def local_scores(self, form: str = "max_probability") -> Tensor:
        """How much the window attends to each older token.

        Forms: `max_probability` (softmax over all live tokens, maximum over the query group, mean
        over the window: G-KV, arXiv 2512.00504, section 3), `max_logit` (maximum over the group
        before a softmax over the older tokens only: R-KV's repository) and `mean_probability`
        (mean over the group: kvpress)."""
        if self.queries is None:
            raise ValueError("view.local_scores: declare Needs(queries=True)")
        return self.ops.local_scores(
            self.queries, self.block_ids, self.live_tokens, self.scale, self.softcap, form
        )

    def redundancy(
        self, *, threshold: float = 0.5, temperature: float = 1.0, within_blocks: bool = False
    ) -> Tensor:
        """How much each unprotected key resembles the others (R-KV, arXiv 2505.24133).

        Mean cosine similarity to the unprotected live tokens, where of near-duplicates (above
        `threshold`) the newest is excused; divided by `temperature`, softmax over these tokens.
        0 at protected tokens. `within_blocks` compares only inside each cache block (Zipage)."""
        similarity = self.ops.redundancy(
            self.block_ids, self.protected, self.live_tokens, threshold, within_blocks
        )
        return self._unprotected((similarity / temperature).softmax(-1))

    def superseded(self) -> Tensor:
        """How much a newer unprotected key resembles each: the largest cosine, at least 0.

        0 at protected tokens."""
        return self._unprotected(self._cosines_to_newer())

    def restated(self, threshold: float, cosines: Tensor | None = None) -> Tensor:
        """How surely each unprotected token was said again later: `reference.restated`.

        0 at protected ones. cosines: what `ops.superseded` gave, if it was called already."""
        cosines = self._cosines_to_newer() if cosines is None else cosines
        return self._unprotected(reference.restated(cosines, threshold))

    def key_norms(self) -> Tensor:
        """The L2 norm of each key."""
        return self._older(self.ops.key_norms(self.block_ids, self.live_tokens))

    def value_norms(self) -> Tensor:
        """The L2 norm of each value; from a dense copy, slow but plain."""
        values = self.ops.values(self.block_ids, self.live_tokens)
        return self._older(values.float().norm(dim=-1))

    def attention_mass(self) -> Tensor:
        """The attention that each unprotected token got from all queries of its group so far.

        0 at protected tokens. Needs(attention_mass=True)."""
        if self.ops.caches.planes is None:
            raise ValueError("view.attention_mass: declare Needs(attention_mass=True)")
        mass = self.ops.caches.read_planes(self.block_ids)
        mass[..., : self.protected] = 0
        return self._older(mass)

    def keys(self) -> Tensor:
        """A dense copy of the keys, [layers, kv_heads, live_tokens, head_dim]: slow but plain."""
        return self.ops.keys(self.block_ids, self.live_tokens)

    def _cosines_to_newer(self) -> Tensor:
        return self.ops.superseded(self.block_ids, self.protected, self.live_tokens)

    def _unprotected(self, numbers: Tensor) -> Tensor:
        """Those of the unprotected tokens, with 0 for the protected ones."""
        return self._older(torch.nn.functional.pad(numbers, (self.protected, 0)))

    def _older(self, per_token: Tensor) -> Tensor:
        return per_token[..., : self.live_tokens - self.window]

    # ---- per unit: [layers, kv_heads, units]

    def units(self, per_token: Tensor, by: str = "max") -> Tensor:
        """The candidates' part of numbers per token, reduced to one number per unit.

        by: `max`, `mean` or `sum` over the tokens of a block; tokens stay as they are."""
        if by not in ("max", "mean", "sum"):
            raise ValueError(f"view.units: unknown reduction '{by}'; valid: max, mean, sum")
        chosen = per_token[..., self.protected : self.protected + self.num_candidates]
        if self.unit == 1:
            return chosen
        if by == "max":
            return self.ops.block_max(chosen, self.unit)
        blocks = chosen.unflatten(-1, (-1, self.unit))
        return blocks.mean(-1) if by == "mean" else blocks.sum(-1)
