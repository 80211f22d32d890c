# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What every worker does for eviction: specs, memory beside the cache, calls around a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from gkv_vllm.attention.wrap import ObservedImpl, live_metadata
from gkv_vllm.config import ConfigError, KVPolicyConfig
from gkv_vllm.engine.footprint import blocks_for, slot_count
from gkv_vllm.engine.plan import PLAN_ATTRIBUTE, REPORT_ATTRIBUTE, WorkerReport
from gkv_vllm.engine.spec import GKVSpec, split_layers
from gkv_vllm.ops import paged
from gkv_vllm.policies import registry
from gkv_vllm.refusals import BACKENDS
from gkv_vllm.worker.device_batch import DeviceBatch
from gkv_vllm.worker.evictor import Evictor
from gkv_vllm.worker.layers import EvictedLayer
from gkv_vllm.worker.mass import MassIndex
from gkv_vllm.worker.ranks import Ranks
from gkv_vllm.worker.rings import QueryRings, RingIndex
from gkv_vllm.worker.runner import RunnerAdapter, watch_builders
from gkv_vllm.worker.runner_v1 import V1Runner
from gkv_vllm.worker.runner_v2 import V2Runner
from gkv_vllm.worker.scorer import Scorer, history_bytes, plane_bytes, ring_bytes
from gkv_vllm.worker.stopwatch import Stopwatch

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

logger = init_logger(f"vllm.{__name__}")

SCORED_TOGETHER = 32768
"""Live tokens of requests that a GPU scores at once; what it takes is set aside at start-up."""
WORK_ARRAYS = 7
"""Float32 arrays of one number per layer, KV head and token that scoring holds at a time.

For redundancy F, sums, norms and losses (in 64 bits); for `restated` F, Z, cosines, and for the
least of three their opposite, its maxima and (in 64 bits) torch's indices of them."""


class EvictionWorkerMixin(Worker):
    """Eviction for any of vLLM's workers; `cpu_worker` and `gpu_worker` say which."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kv_policy = KVPolicyConfig.from_mapping(
            self.vllm_config.additional_config["kv_policy"]
        )
        self.policy = registry.create(self.kv_policy.policy, self.kv_policy.policy_config)
        self.evictor: Evictor | None = None
        self._report: WorkerReport | None = None

    # ---- start-up

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs, with ours for every plain full-attention layer; all others stay."""
        specs = super().get_kv_cache_spec()
        evictable = [
            name
            for name, spec in specs.items()
            if type(spec) is FullAttentionSpec and spec.sliding_window is None
        ]
        groups = split_layers(
            len(evictable), self.kv_policy.layer_groups, self.kv_policy.layer_split
        )
        for name, group in zip(evictable, groups, strict=True):
            specs[name] = GKVSpec.from_full_attention(specs[name], self.kv_policy, group)
        return specs

    def determine_available_memory(self) -> int:
        """Leave room for what is kept beside the cache: per block, and per request with a slot."""
        available = super().determine_available_memory()
        specs = [s for s in self.get_kv_cache_spec().values() if isinstance(s, GKVSpec)]
        if not specs:
            return available
        block_bytes = sum(spec.page_size_bytes for spec in specs)
        override = self.cache_config.num_gpu_blocks_override
        pool = override if override is not None else available // block_bytes
        beside = self._plane_bytes(specs)
        slot_bytes = self._slot_bytes(specs)
        slots = self._slots(pool, specs[0].block_size) if slot_bytes else 0
        work = self._work_bytes(specs)
        if work:
            logger.info("KV policy: %.1f MiB are set aside for scoring", work / 2**20)
        logger.info(
            "KV policy %s: query rings and block history take %.1f KiB per request, %.1f MiB for "
            "%d requests; scores of tokens take %.2f %% of the KV cache, %d bytes per token",
            self.kv_policy.policy,
            slot_bytes / 2**10,
            slots * slot_bytes / 2**20,
            slots,
            100 * beside / block_bytes,
            beside // specs[0].block_size,
        )
        return int((available - work - slots * slot_bytes) * block_bytes / (block_bytes + beside))

    def _slots(self, pool_blocks: int, block_size: int) -> int:
        return slot_count(
            self.scheduler_config.max_num_seqs,
            pool_blocks - 1,
            self.kv_policy.smallest_budget(block_size),
            block_size,
        )

    def _slot_bytes(self, specs: list[GKVSpec]) -> int:
        """Query rings, and block history unless scores are kept per token."""
        spec, needs = specs[0], self.policy.needs
        rings = ring_bytes(
            layers=len(specs),
            query_heads=self.model_config.get_num_attention_heads(self.parallel_config),
            head_dim=spec.head_size,
            window=self.kv_policy.window,
            itemsize=self.model_config.dtype.itemsize,
        )
        history = history_bytes(
            layers=len(specs),
            kv_heads=spec.num_kv_heads,
            max_blocks=blocks_for(self.model_config.max_model_len, spec.block_size),
        )
        in_slots = needs.history and not self.kv_policy.moves_tokens
        return rings * needs.queries + history * in_slots

    def _work_bytes(self, specs: list[GKVSpec]) -> int:
        """What scoring takes on a GPU, where vLLM leaves nothing of the memory unused."""
        if not self.on_gpu:
            return 0
        tokens = max(SCORED_TOGETHER, self.model_config.max_model_len)
        return 4 * WORK_ARRAYS * len(specs) * specs[0].num_kv_heads * tokens

    def _plane_bytes(self, specs: list[GKVSpec]) -> int:
        """One number per token, for each KV block."""
        if not self._has_planes():
            return 0
        return plane_bytes(
            layers=len(specs), kv_heads=specs[0].num_kv_heads, block_size=specs[0].block_size
        )

    def _has_planes(self) -> bool:
        needs = self.policy.needs
        return needs.attention_mass or (needs.history and self.kv_policy.moves_tokens)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        self.evictor = self._build_evictor(kv_cache_config)

    def _build_evictor(self, kv_cache_config: KVCacheConfig) -> Evictor:
        owners = self._evicted_layers(kv_cache_config)
        layer_group_of = {group: spec.layer_group for group, spec in owners.values()}
        block_size = next(spec.block_size for _, spec in owners.values())
        slots = self._slots(kv_cache_config.num_blocks, block_size)
        needs = self.policy.needs
        rings, ring_index = None, None
        if needs.queries:
            rings, ring_index = self._query_rings(slots, list(owners))
        mass_index = MassIndex() if needs.attention_mass else None
        ops = paged.resolve(self.kv_policy.impl, "cuda" if self.on_gpu else "cpu")
        planes = self._planes(kv_cache_config, owners, block_size) if self._has_planes() else {}
        layers: list[EvictedLayer] = []
        for name, (group, spec) in owners.items():
            impl, cache = self._layer(name).impl, self._layer(name).kv_cache
            if not isinstance(impl, ObservedImpl):
                usable = " or ".join(BACKENDS[self.device.type])
                raise ConfigError(
                    f"attention layer {name} runs {type(impl).__name__}, which would read evicted "
                    f"blocks; set --attention-backend to {usable}, or "
                    "serve this model without --kv-policy"
                )
            if (kernel := cache.shape[2]) != spec.block_size:
                raise ConfigError(
                    f"attention layer {name} splits each block of {spec.block_size} tokens into "
                    f"blocks of {kernel}, so that tables number other blocks than the scheduler; "
                    f"set --block-size {kernel}, or serve this model without --kv-policy"
                )
            layer = EvictedLayer(
                ops=ops,
                kv_group=group,
                layer_group=spec.layer_group,
                kv_cache=cache,
                plane=planes.get(cache.data_ptr()),
                ring=rings.of_layer(len(layers)) if rings is not None else None,
                ring_index=ring_index,
                mass=mass_index,
                kv_heads=impl.num_kv_heads,
                head_dim=impl.head_size,
                scale=impl.scale,
                softcap=impl.logits_soft_cap or 0.0,
            )
            if rings is not None or mass_index is not None:
                impl.query_sink = layer
            layers.append(layer)
        scorer = Scorer(
            self.policy,
            layers,
            ops,
            window=self.kv_policy.window,
            block_size=block_size,
            moves_tokens=self.kv_policy.moves_tokens,
            scope=self.kv_policy.scope,
            slots=slots,
            max_blocks=blocks_for(self.model_config.max_model_len, block_size),
            rings=rings,
            ring_index=ring_index,
            ranks=self._ranks(),
            together=SCORED_TOGETHER if self.on_gpu else 0,
        )
        adapter = V2Runner if self.use_v2_model_runner else V1Runner
        runner: RunnerAdapter = adapter(self.model_runner)
        evictor = Evictor(
            runner,
            scorer,
            layer_group_of,
            ring_index=ring_index,
            mass_index=mass_index,
            stopwatch=self._stopwatch(),
        )
        first, *_ = layer_group_of

        def prepare(group: int) -> Callable[[Any], Any]:
            if not self.on_gpu:
                return partial(_prepare_on_host, evictor, ops, block_size, group)
            return DeviceBatch(
                evictor,
                ops,
                block_size=block_size,
                max_rows=self._max_rows(),
                group=group,
                ring_index=ring_index if group == first else None,
                mass_index=mass_index,
                device=self.device,
            )

        watch_builders(self.model_runner, prepare, list(layer_group_of))
        return evictor

    def _stopwatch(self) -> Stopwatch:
        if self.device.type != "cuda":
            return Stopwatch()
        return Stopwatch(partial(torch.cuda.Event, enable_timing=True))

    @property
    def on_gpu(self) -> bool:
        """Whether the host must not wait for the device, whose caches have a GPU's layout."""
        return self.device.type != "cpu"

    def _max_rows(self) -> int:
        """The most rows of a batch: a CUDA graph may pad it beyond the most requests."""
        padded = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        return max(self.scheduler_config.max_num_seqs, padded)

    def _ranks(self) -> Ranks:
        if self.parallel_config.tensor_parallel_size == 1:
            return Ranks()
        group = get_tp_group()
        return Ranks(
            group.device_group if self.on_gpu else group.cpu_group,
            self.model_config.get_total_num_kv_heads(),
        )

    def _planes(
        self, kv_cache_config: KVCacheConfig, layers: Iterable[str], block_size: int
    ) -> dict[int, torch.Tensor]:
        """One number per cached token, by the address of a layer's cache.

        Layers of different KV cache groups may share a cache: so do their planes."""
        caches = list(dict.fromkeys(self._layer(name).kv_cache.data_ptr() for name in layers))
        heads = self._layer(next(iter(layers))).impl.num_kv_heads
        size = (len(caches), kv_cache_config.num_blocks, heads, block_size)
        return dict(zip(caches, torch.zeros(size, device=self.device), strict=True))

    def _query_rings(self, slots: int, layers: list[str]) -> tuple[QueryRings, RingIndex]:
        window, impl = self.kv_policy.window, self._layer(layers[0]).impl
        rings = QueryRings(
            window,
            layers=len(layers),
            slots=slots,
            query_heads=impl.num_heads,
            head_dim=impl.head_size,
            dtype=self.model_config.dtype,
            device=self.device,
        )
        # A batch that a CUDA graph pads may be larger than one that is scheduled.
        padded = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        max_tokens = max(self.scheduler_config.max_num_batched_tokens, padded)
        return rings, RingIndex(window, max_tokens, self.device, every_step=self.on_gpu)

    def _evicted_layers(self, kv_cache_config: KVCacheConfig) -> dict[str, tuple[int, GKVSpec]]:
        """The layers that own an evictable cache, in the model's order: KV cache group and spec."""
        owners: dict[str, tuple[int, GKVSpec]] = {}
        for index, group in enumerate(kv_cache_config.kv_cache_groups):
            names = [name for name in group.layer_names if self._owns_cache(name)]
            specs = {name: _spec_of(group, name) for name in names}
            ours = {name: spec for name, spec in specs.items() if isinstance(spec, GKVSpec)}
            layer_groups = {spec.layer_group for spec in ours.values()}
            if ours and (len(ours) < len(specs) or len(layer_groups) > 1):
                raise ConfigError(
                    "vLLM put layers that keep different blocks into one KV cache group; serve "
                    "this model without --kv-policy, or with --kv-layer-groups 1"
                )
            owners |= {name: (index, spec) for name, spec in ours.items()}
        in_order = self.vllm_config.compilation_config.static_forward_context
        return {name: owners[name] for name in in_order if name in owners}

    def _layer(self, name: str) -> Any:
        return self.vllm_config.compilation_config.static_forward_context[name]

    def _owns_cache(self, name: str) -> bool:
        return getattr(self._layer(name), "kv_sharing_target_layer_name", None) is None

    # ---- one step

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        assert self.evictor is not None
        self.evictor.begin(
            getattr(scheduler_output, PLAN_ATTRIBUTE, None),
            scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set()),
        )
        output = super().execute_model(scheduler_output)
        report = self.evictor.finish()
        if report is not None:
            self._report = report.after(self._report)
        return output

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        output = super().sample_tokens(grammar_output)
        report, self._report = self._report, None
        if report is not None:
            setattr(_returned(output), REPORT_ATTRIBUTE, report)
        return output


def _prepare_on_host(
    evictor: Evictor,
    ops: paged.PagedOps,
    block_size: int,
    group: int,
    metadata: CommonAttentionMetadata,
) -> CommonAttentionMetadata:
    live = live_metadata(metadata, block_size, ops.squeeze_live_table)
    evictor.begin_forward(group, metadata, live)
    return live


def _returned(output: Any) -> Any:
    """What the scheduler will get: an asynchronous output is a promise of something that exists."""
    if not isinstance(output, AsyncModelRunnerOutput):
        return output
    return getattr(output, "model_runner_output", None) or output._model_runner_output


def _spec_of(group: Any, layer_name: str) -> KVCacheSpec:
    by_layer = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return by_layer.get(layer_name) if by_layer else group.kv_cache_spec
