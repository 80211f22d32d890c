# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""vLLM's workers with eviction: specs, memory for rings and history, calls around a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from gkv_vllm.attention import cpu as cpu_attention
from gkv_vllm.config import ConfigError, KVPolicyConfig
from gkv_vllm.engine.footprint import blocks_for, slot_count
from gkv_vllm.engine.plan import PLAN_ATTRIBUTE, SCORES_ATTRIBUTE, BlockScores
from gkv_vllm.engine.spec import GKVSpec
from gkv_vllm.policies import registry
from gkv_vllm.worker.evictor import Evictor
from gkv_vllm.worker.rings import QueryRing, RingIndex
from gkv_vllm.worker.runner_v1 import V1Runner
from gkv_vllm.worker.scorer import BlockScorer, ScoredLayer, state_bytes_per_slot

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

logger = init_logger(f"vllm.{__name__}")


class EvictionWorkerMixin(Worker):
    """What every worker does for eviction; a subclass names the platform's worker and backend."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kv_policy = KVPolicyConfig.from_mapping(
            self.vllm_config.additional_config["kv_policy"]
        )
        self.policy = registry.create(self.kv_policy.policy, self.kv_policy.policy_config)
        self.evictor: Evictor | None = None
        self._scores: BlockScores | None = None

    # ---- start-up

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs, with ours for every plain full-attention layer; all others stay."""
        return {
            name: GKVSpec.from_full_attention(spec, self.kv_policy)
            if type(spec) is FullAttentionSpec and spec.sliding_window is None
            else spec
            for name, spec in super().get_kv_cache_spec().items()
        }

    def determine_available_memory(self) -> int:
        """Leave room for rings and history: as many slots as the remaining pool can need."""
        available = super().determine_available_memory()
        specs = self._evictable_specs(self.get_kv_cache_spec())
        if not specs or not self.policy.needs_queries:
            return available
        block_bytes = sum(spec.page_size_bytes for spec in specs.values())
        override = self.cache_config.num_gpu_blocks_override
        pool = override if override is not None else available // block_bytes
        slot_bytes = self._slot_bytes(specs)
        reserved = self._slots(pool, next(iter(specs.values())).block_size) * slot_bytes
        logger.info(
            "KV policy %s: %.1f MiB for query rings and score history (%.1f KiB per request)",
            self.kv_policy.policy,
            reserved / 2**20,
            slot_bytes / 2**10,
        )
        return available - reserved

    def _evictable_specs(self, specs: dict[str, KVCacheSpec]) -> dict[str, GKVSpec]:
        return {name: spec for name, spec in specs.items() if isinstance(spec, GKVSpec)}

    def _slots(self, pool_blocks: int, block_size: int) -> int:
        return slot_count(
            self.scheduler_config.max_num_seqs,
            pool_blocks - 1,
            self.kv_policy.smallest_budget(block_size),
            block_size,
        )

    def _slot_bytes(self, specs: dict[str, GKVSpec]) -> int:
        spec = next(iter(specs.values()))
        return state_bytes_per_slot(
            layers=len(specs),
            query_heads=self.model_config.get_num_attention_heads(self.parallel_config),
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_size,
            window=self.kv_policy.window,
            max_blocks=blocks_for(self.model_config.max_model_len, spec.block_size),
            query_itemsize=self.model_config.dtype.itemsize,
        )

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        self.evictor = self._build_evictor(kv_cache_config)

    def _build_evictor(self, kv_cache_config: KVCacheConfig) -> Evictor:
        group_ids: list[int] = []
        owners: list[tuple[str, int]] = []
        for index, group in enumerate(kv_cache_config.kv_cache_groups):
            names = [n for n in group.layer_names if self._owns_cache(n)]
            members = [n for n in names if self._spec_of(group, n) is not None]
            if members and len(members) != len(names):
                raise ConfigError(
                    "vLLM put evictable and other layers into one KV cache group; serve this "
                    "model without --kv-policy"
                )
            if members:
                group_ids.append(index)
                owners += [(n, index) for n in members]
        runner = V1Runner(self.model_runner, group_ids)
        if not self.policy.needs_queries:
            return Evictor(runner, None, None)
        block_size = kv_cache_config.kv_cache_groups[group_ids[0]].kv_cache_spec.block_size
        slots = self._slots(kv_cache_config.num_blocks, block_size)
        ring_index = RingIndex(self.kv_policy.window, self.device)
        scorer = BlockScorer(
            self.policy,
            [self._scored_layer(*owner, ring_index, slots) for owner in owners],
            cpu_attention.gather_keys,
            slots=slots,
            max_blocks=blocks_for(self.model_config.max_model_len, block_size),
            block_size=block_size,
        )
        evictor = Evictor(runner, scorer, ring_index)
        for group_id in group_ids:
            for attention_group in self.model_runner.attn_groups[group_id]:
                for builder in attention_group.metadata_builders:
                    builder.observer = evictor
        return evictor

    def _spec_of(self, group: Any, layer_name: str) -> GKVSpec | None:
        spec = group.kv_cache_spec
        by_layer = getattr(spec, "kv_cache_specs", None)
        spec = by_layer.get(layer_name) if by_layer else spec
        return spec if isinstance(spec, GKVSpec) else None

    def _layer(self, name: str) -> Any:
        return self.vllm_config.compilation_config.static_forward_context[name]

    def _owns_cache(self, name: str) -> bool:
        return getattr(self._layer(name), "kv_sharing_target_layer_name", None) is None

    def _scored_layer(self, name: str, group: int, index: RingIndex, slots: int) -> ScoredLayer:
        layer = self._layer(name)
        impl = layer.impl
        ring = QueryRing(index, slots, impl.num_heads, impl.head_size, self.model_config.dtype)
        impl.query_sink = ring
        return ScoredLayer(
            group=group,
            kv_cache=layer.kv_cache,
            ring=ring,
            kv_heads=impl.num_kv_heads,
            head_dim=impl.head_size,
            scale=impl.scale,
            softcap=impl.logits_soft_cap or 0.0,
        )

    # ---- one step

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        assert self.evictor is not None
        self.evictor.begin(getattr(scheduler_output, PLAN_ATTRIBUTE, None))
        output = super().execute_model(scheduler_output)
        self._scores = self.evictor.finish()
        return output

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        output = super().sample_tokens(grammar_output)
        scores, self._scores = self._scores, None
        if scores is not None:
            # An asynchronous output is a promise; what it will return exists already.
            target = (
                output._model_runner_output
                if isinstance(output, AsyncModelRunnerOutput)
                else output
            )
            setattr(target, SCORES_ATTRIBUTE, scores)
        return output


class GKVCPUWorker(EvictionWorkerMixin, CPUWorker):
    """Eviction in vLLM's CPU worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cpu_attention.register()
        super().__init__(*args, **kwargs)
