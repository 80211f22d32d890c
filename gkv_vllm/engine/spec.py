# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The KV cache spec of evictable layers: what makes vLLM pick our block manager."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self

from vllm.v1.kv_cache_interface import FullAttentionSpec

from gkv_vllm.config import KVPolicyConfig
from gkv_vllm.engine.footprint import bounded_blocks, due_tokens, protected_blocks

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


def steps_ahead(vllm_config: VllmConfig) -> int:
    """Steps that a request may be ahead of the rule when an eviction happens.

    With one batch at a time that is the step that makes it due. With two, one more starts before
    the scores arrive; and the step that makes it due may itself follow one that the eviction
    before did not count."""
    return 2 * vllm_config.max_concurrent_batches - 1


def in_flight_tokens(vllm_config: VllmConfig) -> int:
    """Tokens of those steps when each computes a whole prefill chunk of the request."""
    return steps_ahead(vllm_config) * vllm_config.scheduler_config.max_num_batched_tokens


def split_layers(layers: int, groups: int, split: str) -> list[int]:
    """The layer group of each layer: neighbours together (`contiguous`) or dealt out in turn."""
    if split == "interleaved":
        return [layer % groups for layer in range(layers)]
    return [layer * groups // layers for layer in range(layers)]


@dataclass(frozen=True)
class RequestBound:
    """What bounds a request with the server's settings, in tokens: good for any block size."""

    protect: str
    prompt_tokens: int
    budget: int
    interval: int

    def blocks(self, in_flight_tokens: int, block_size: int) -> int:
        """The most blocks such a request holds."""
        protected = protected_blocks(self.protect, self.prompt_tokens, block_size)
        due = due_tokens(self.budget, self.interval, block_size)
        return bounded_blocks(protected, due, in_flight_tokens, block_size)


@dataclass(frozen=True, kw_only=True)
class GKVSpec(FullAttentionSpec):
    """Full attention over a table with holes: same pages, bounded number of them per request."""

    bound: RequestBound | None = None
    layer_group: int = 0
    """Layers of one group keep the same blocks."""

    @classmethod
    def from_full_attention(
        cls, spec: FullAttentionSpec, config: KVPolicyConfig, layer_group: int = 0
    ) -> Self:
        """The same pages as `spec`, bounded by the server's settings."""
        inherited = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}
        bound = RequestBound(config.protect, config.reserved_prompt, config.budget, config.interval)
        return cls(**inherited, bound=bound, layer_group=layer_group)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the most blocks a request holds: makes "Maximum concurrency" true."""
        whole = super().max_memory_usage_bytes(vllm_config)
        if self.bound is None:
            return whole
        blocks = self.bound.blocks(in_flight_tokens(vllm_config), self.block_size)
        return min(whole, blocks * self.page_size_bytes)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all these layers may share a KV cache group, and so a block table."""
        groups = {getattr(spec, "layer_group", None) for spec in kv_cache_specs.values()}
        return len(groups) == 1 and super().is_uniform_with_collection(kv_cache_specs)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for all layers of a group (vLLM's merge, which knows only its own fields).

        AssertionError, which vLLM takes as a no, for layers that keep different blocks."""
        assert all(isinstance(spec, GKVSpec) for spec in specs), "evictable and other layers mixed"
        assert len({spec.layer_group for spec in specs}) == 1, "layers that keep different blocks"
        return replace(super().merge(specs), bound=specs[0].bound, layer_group=specs[0].layer_group)
