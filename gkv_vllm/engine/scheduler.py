# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Wires planner and block manager into vLLM's schedulers; the rules themselves are in `planner`."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from gkv_vllm.config import ConfigError, KVPolicyConfig, RequestPolicy
from gkv_vllm.engine.block_manager import GKVBlockManager, register_spec
from gkv_vllm.engine.footprint import (
    bounded_blocks,
    due_tokens,
    peak_blocks,
    pool_problem,
    protected_blocks,
    slot_count,
)
from gkv_vllm.engine.plan import PLAN_ATTRIBUTE, REPORT_ATTRIBUTE, Selection
from gkv_vllm.engine.planner import EvictionPlanner, choose_targets
from gkv_vllm.engine.recorder import Recorder
from gkv_vllm.engine.spec import in_flight_tokens, steps_ahead
from gkv_vllm.policies import registry

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")

LOG_INTERVAL_SECONDS = 10.0

register_spec()


class EvictionMixin(Scheduler):
    """One step: free what the scores condemned, schedule as vLLM does, tell the worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        additional = self.vllm_config.additional_config
        self.kv_policy = KVPolicyConfig.from_mapping(additional["kv_policy"])
        self.evicting_managers = self._find_managers()
        block_size = self.evicting_managers[0].block_size
        self.kv_policy.check_block_size(block_size)
        self._in_flight_tokens = in_flight_tokens(self.vllm_config)
        self._check_pool(block_size)
        self.planner = EvictionPlanner(
            self.kv_policy,
            registry.create(self.kv_policy.policy, self.kv_policy.policy_config).needs,
            block_size=block_size,
            num_slots=slot_count(
                self.scheduler_config.max_num_seqs,
                self.kv_cache_config.num_blocks - 1,
                self.kv_policy.smallest_budget(block_size),
                block_size,
            ),
        )
        self.recorder: Recorder | None = None
        if self.kv_policy.record_positions is not None:
            self.recorder = self._build_recorder(Path(self.kv_policy.record_positions))
        self._next_log = time.monotonic() + LOG_INTERVAL_SECONDS

    def _build_recorder(self, folder: Path) -> Recorder:
        groups = self.kv_cache_config.kv_cache_groups
        group_of = {
            layer: manager.layer_group
            for manager in self.evicting_managers
            for layer in groups[manager.kv_cache_group_id].layer_names
        }
        model = self.vllm_config.model_config
        return Recorder(
            folder,
            self.kv_policy,
            model=str(model.model),
            kv_heads=model.get_total_num_kv_heads(),
            layer_groups=[group_of[layer] for layer in sorted(group_of, key=_depth)],
            block_size=self.planner.block_size,
        )

    def _find_managers(self) -> list[GKVBlockManager]:
        managers = [
            manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, GKVBlockManager)
        ]
        sizes = {manager.block_size for manager in managers}
        if len(sizes) != 1:
            raise ConfigError(
                "the model has no full-attention layer whose KV cache could be evicted"
                if not sizes
                else f"the full-attention layers use blocks of different sizes {sorted(sizes)}, "
                "and a KV policy needs one"
            )
        groups = {manager.layer_group for manager in managers}
        if len(groups) != self.kv_policy.layer_groups:
            raise ConfigError(
                f"kv_policy layer_groups={self.kv_policy.layer_groups}, but the model's "
                f"full-attention layers can be split into {len(groups)} at most; lower layer_groups"
            )
        return managers

    def _check_pool(self, block_size: int) -> None:
        """Refuse a budget that the pool cannot even reach, and say what the bound means here."""
        config, pool = self.kv_policy, self.kv_cache_config.num_blocks - 1
        groups = len(self.evicting_managers)
        if problem := pool_problem(config, block_size, pool, groups):
            raise ConfigError(problem)
        due = due_tokens(config.budget, config.interval, block_size)
        protected = protected_blocks(config.protect, config.reserved_prompt, block_size)
        decoding = groups * bounded_blocks(
            protected, due, steps_ahead(self.vllm_config), block_size
        )
        logger.info(
            "KV policy %s: a decoding request holds at most %d blocks of %d tokens (prompt up to "
            "%d tokens, protect=%s); the pool of %d blocks decodes %.1f such requests",
            config.policy,
            decoding,
            block_size,
            config.reserved_prompt,
            config.protect,
            pool,
            pool / decoding,
        )

    # ---- requests come and go

    def add_request(self, request: Request) -> None:
        is_new = request.request_id not in self.requests
        params = request.sampling_params
        # Before vLLM queues it: a request that skipped the API's check must leave nothing behind.
        policy = self.kv_policy.for_request(
            params.extra_args if params else None, self.planner.block_size
        )
        super().add_request(request)
        if is_new:
            self._follow(request, policy)

    def _follow(self, request: Request, policy: RequestPolicy) -> None:
        self.planner.add(
            request.request_id,
            prompt_tokens=request.num_prompt_tokens,
            policy=policy,
            key=_request_key(request) if self.planner.needs.seeded else 0,
        )
        if policy.record and self.recorder is not None:
            self.recorder.begin(request.request_id, policy)
        room = self.max_model_len - request.num_prompt_tokens
        if policy.evict:
            # To the longest sequence there can be: a streaming session may grow beyond max_tokens.
            bound = self._peak_blocks(request, policy, room)
            for manager in self.evicting_managers:
                manager.bound(request.request_id, bound)
        self._reject_if_too_large(
            request, self._peak_blocks(request, policy, min(request.max_tokens, room))
        )

    def _reject_if_too_large(self, request: Request, peak: int) -> None:
        """End a request that could never be admitted, rather than let it block the queue.

        With one KV cache group the API has refused it already (HTTP 400); it cannot know how many
        groups share the pool, nor what windowed layers hold."""
        needed, pool = 0, self.kv_cache_config.num_blocks - 1
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            cap = manager.max_admission_blocks_per_request
            needed += min(peak, cap) if cap is not None else peak
        if needed <= pool:
            return
        logger.warning(
            "request %s may need %d KV blocks in all groups, and the pool has %d: it is ended; "
            "lower its max_tokens or kv_budget, or give the KV cache more memory",
            request.request_id,
            needed,
            pool,
        )
        # vLLM ends the requests of this set with an error, and tells their clients.
        self.grammar_compile_error_reqs.add(request.request_id)

    def _peak_blocks(self, request: Request, policy: RequestPolicy, max_tokens: int) -> int:
        return peak_blocks(
            policy,
            prompt_tokens=request.num_prompt_tokens,
            max_tokens=max_tokens,
            block_size=self.planner.block_size,
            interval=self.kv_policy.interval,
            in_flight_tokens=self._in_flight_tokens,
        )

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.planner.restart(request.request_id)
        if self.recorder is not None:
            self.recorder.restart(request.request_id)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.planner.remove(request.request_id)
        self._end_record(request, request.status.name.removeprefix("FINISHED_").lower())
        for manager in self.evicting_managers:
            manager.unbound(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def _end_record(self, request: Request, finish: str) -> None:
        if self.recorder is not None:
            self.recorder.end(
                request.request_id,
                token_ids=request.all_token_ids,
                prompt_tokens=request.num_prompt_tokens,
                finish=finish,
            )

    def shutdown(self) -> None:
        super().shutdown()
        if self.recorder is not None:
            for request_id in self.recorder.followed:
                self._end_record(self.requests[request_id], "shutdown")
            self.recorder.close()

    # ---- one step

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._evict()
        output = super().schedule(*args, **kwargs)
        plan = self.planner.plan(self._progress(output.num_scheduled_tokens))
        if self.recorder is not None:
            self.recorder.planned(plan)
        if plan:
            setattr(output, PLAN_ATTRIBUTE, plan)
        return output

    def _get_local_prefix_cache_hit(self, request: Request) -> Any:
        """As vLLM's, within what the request may start with."""
        usable = self.planner.usable_prefix(request.request_id)
        if usable is None:
            return super()._get_local_prefix_cache_hit(request)
        hashes = request.block_hashes
        request.block_hashes = hashes[: usable // self.hash_block_size]
        try:
            return super()._get_local_prefix_cache_hit(request)
        finally:
            request.block_hashes = hashes

    def _evict(self) -> None:
        if self.kv_policy.moves_tokens:
            for request_id, selection in self.planner.compactions().items():
                self._compact(request_id, selection)
            return
        for request_id, blocks in self.planner.evictions().items():
            exact_tokens = self.requests[request_id].num_computed_tokens
            for manager in self.evicting_managers:
                manager.evict(request_id, blocks[manager.layer_group], exact_tokens)

    def _compact(self, request_id: str, selection: Selection) -> None:
        """Find blocks for the survivors of a request and free the others."""
        (candidates,) = selection.candidates
        managers = self.evicting_managers
        private = [manager.private(request_id, candidates) for manager in managers]
        places, fresh = choose_targets(
            [all(of) for of in zip(*private, strict=True)], selection.keep
        )
        if len(fresh) * len(managers) > self.kv_cache_manager.block_pool.get_num_free_blocks():
            self.planner.postpone(request_id, "no_free_block")
            return
        targets, renewed = [candidates[i] for i in places], [candidates[i] for i in fresh]
        gone = sorted(set(candidates) - set(targets))
        exact_tokens = self.requests[request_id].num_computed_tokens
        new_ids: dict[int, dict[int, int]] = {}
        for manager in managers:
            ids = manager.repurpose(request_id, targets, renewed, exact_tokens)
            if ids:
                new_ids[manager.kv_cache_group_id] = ids
            manager.evict(request_id, gone, exact_tokens)
        self.planner.compacted(request_id, targets, new_ids)

    def _progress(self, scheduled: Iterable[str]) -> Iterable[tuple[str, int]]:
        """Requests of this step and the tokens each has computed once it is done.

        vLLM has already advanced `num_computed_tokens` when schedule() returns."""
        return ((id_, self.requests[id_].num_computed_tokens) for id_ in scheduled)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        report = getattr(model_runner_output, REPORT_ATTRIBUTE, None)
        if report is not None:
            self.planner.accept(report)
            if self.recorder is not None:
                self.recorder.reported(report)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.num_kv_fetch_reqs_by_stage.update(self.planner.stats.drain())
        self._log()
        return stats

    def _log(self) -> None:
        now = time.monotonic()
        if now < self._next_log:
            return
        self._next_log = now + LOG_INTERVAL_SECONDS
        if line := self.planner.stats.log_line():
            logger.info("%s", line)


class GKVScheduler(EvictionMixin, Scheduler):
    """Eviction in vLLM's synchronous scheduler."""


class GKVAsyncScheduler(EvictionMixin, AsyncScheduler):
    """Eviction in vLLM's asynchronous scheduler: scores arrive one step later."""


def _depth(layer: str) -> list[int]:
    """Sorts layers by their place in the model, by the numbers of their names."""
    return [int(number) for number in re.findall(r"\d+", layer)]


def _request_key(request: Request) -> int:
    """What a random draw depends on: the prompt and the seed, so that a request repeats.

    A sampled request without a seed does not repeat anyway; its id keeps siblings apart."""
    params = request.sampling_params
    seed = params.seed if params else None
    if params and seed is None and params.temperature > 0:
        return zlib.crc32(request.request_id.encode())
    prompt = ",".join(map(str, request.prompt_token_ids or ()))
    return zlib.crc32(f"{seed}:{prompt}".encode())
