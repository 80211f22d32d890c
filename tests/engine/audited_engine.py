# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""vLLM's EngineCore loop around a real scheduler with eviction, audited after every step."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from vllm.v1.core.kv_cache_utils import get_group_id
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from gkv_vllm.config import KVPolicyConfig
from gkv_vllm.engine.footprint import peak_blocks
from gkv_vllm.engine.plan import PLAN_ATTRIBUTE, REPORT_ATTRIBUTE, StepPlan
from gkv_vllm.engine.scheduler import GKVAsyncScheduler, GKVScheduler
from gkv_vllm.engine.spec import in_flight_tokens

from .simulation import BLOCK, EXACT, Content, Worker, token_at


class Engine:
    """Adds, steps and aborts requests; `finish` runs until nothing is left."""

    def __init__(
        self,
        config: Any,
        kv_cache_config: Any,
        new_request: Callable[..., Any],
    ) -> None:
        cls = GKVAsyncScheduler if config.scheduler_config.async_scheduling else GKVScheduler
        self.scheduler = cls(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=True,
        )
        self.depth = config.max_concurrent_batches
        self.config = config
        self.policy: KVPolicyConfig = self.scheduler.kv_policy
        self.planner = self.scheduler.planner
        self.new_request = new_request
        self.managers = self.scheduler.evicting_managers
        assert [manager.kv_cache_group_id for manager in self.managers] == list(
            range(len(kv_cache_config.kv_cache_groups))
        )
        for manager in self.managers:
            assert manager.records_new_block_ids
        self.worker = Worker(
            window=self.policy.window,
            needs=self.planner.needs,
            moves_tokens=self.policy.moves_tokens,
            layer_group_of=[manager.layer_group for manager in self.managers],
            check_target=self._check_target,
        )
        self.in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.usable = kv_cache_config.num_blocks - 1
        self.requests: dict[str, Any] = {}
        self.aborted: set[str] = set()
        self.starved: dict[str, int] = {}
        """Requests that could not be evicted when they were due, and their epoch."""
        self.cached: dict[Any, list[Content]] = {}
        """What was ever found under a hash of the prefix cache."""
        self.kept: dict[str, list[Any]] = {}
        """What each eviction of a request dropped, and where its survivors went."""
        self.fresh = 0
        """Shared blocks that a new one replaced."""
        self.steps = 0
        self._watch_postponed()

    def _watch_postponed(self) -> None:
        postpone = self.planner.postpone

        def watched(request_id: str, reason: str) -> None:
            postpone(request_id, reason)
            self.starved[request_id] = self.planner.tracks[request_id].epoch

        self.planner.postpone = watched  # type: ignore[method-assign]

    # ---- requests

    def add(
        self, request_id: str, prompt: list[int], max_tokens: int, extra: dict[str, Any]
    ) -> bool:
        """Add a request unless the front end would refuse it (HTTP 400) or its id is in use."""
        busy = any(request_id in output.num_scheduled_tokens for output, _ in self.in_flight)
        if busy or request_id in self.scheduler.requests:
            return False
        request = self.new_request(
            request_id, prompt, max_tokens=max_tokens, block_size=BLOCK, extra_args=extra
        )
        if self.peak(request) * len(self.managers) > self.usable:
            return False
        self.requests[request_id] = request
        self.aborted.discard(request_id)
        self.scheduler.add_request(request)
        return True

    def peak(self, request: Any) -> int:
        """The most blocks it holds in one KV cache group: what is admitted against the pool."""
        return peak_blocks(
            self.policy.for_request(request.sampling_params.extra_args, BLOCK),
            prompt_tokens=request.num_prompt_tokens,
            max_tokens=request.max_tokens,
            block_size=BLOCK,
            interval=self.policy.interval,
            in_flight_tokens=in_flight_tokens(self.config),
        )

    def abort(self, request_id: str) -> None:
        if request_id in self.scheduler.requests:
            self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
            self.aborted.add(request_id)
            self.audit()

    def reset_prefix_cache(self, preempting: bool) -> None:
        self.scheduler.reset_prefix_cache(reset_running_requests=preempting)
        self.audit()

    # ---- steps

    def step(self) -> None:
        """As EngineCore.step, or step_with_batch_queue when two batches may be in flight."""
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.steps += 1
            self.in_flight.append((output, self._execute(output)))
            self._audit_schedule(output)
            if len(self.in_flight) < self.depth:
                return
        if self.in_flight:
            self.scheduler.update_from_output(*self.in_flight.popleft())
            self.audit()

    def _execute(self, output: Any) -> ModelRunnerOutput:
        report = self.worker.step(output)
        ids = list(output.num_scheduled_tokens)
        sampled = []
        for request_id in ids:
            request, row = self.scheduler.requests[request_id], self.worker.rows[request_id]
            done = not request.is_prefill_chunk
            sampled.append([token_at(row.prompt, row.num_computed)] if done else [])
        result = ModelRunnerOutput(ids, {id_: i for i, id_ in enumerate(ids)}, sampled)
        if report is not None:
            setattr(result, REPORT_ATTRIBUTE, report)
        return result

    def finish(self, limit: int = 20_000) -> None:
        """Run until nothing is left, then check that nothing stayed behind."""
        for _ in range(limit):
            if not self.in_flight and not self.scheduler.has_requests():
                break
            self.step()
        assert not self.scheduler.has_requests(), "the engine makes no progress"
        for request_id, request in self.requests.items():
            if request_id not in self.aborted:
                assert len(request.output_token_ids) == request.max_tokens
        assert self.pool.get_num_free_blocks() == self.usable
        assert self.planner.tracks == {}
        assert not self.planner._ready
        assert not self.planner._next
        assert sorted(self.planner._free_slots) == list(range(len(self.planner._free_slots)))
        for manager in self.managers:
            for leftover in ("req_to_blocks", "_admission_blocks", "_exact_tokens"):
                assert not getattr(manager, leftover), leftover

    # ---- audits

    def _audit_schedule(self, output: Any) -> None:
        plan: StepPlan = getattr(output, PLAN_ATTRIBUTE, None) or StepPlan()
        assert set(plan.compact) == (set(plan.drops) if self.policy.moves_tokens else set())
        for request_id, groups in plan.drops.items():
            order = plan.compact.get(request_id)
            self.kept.setdefault(request_id, []).append((groups, order and order.targets))
            self.starved.pop(request_id, None)
            if order is not None:
                self.fresh += sum(map(len, order.fresh.values()))
            else:
                first_written = min(self._first_writes(request_id))
                last = max(block for blocks in groups for block in blocks)
                assert (last + 1) * BLOCK <= first_written, "a block in use was freed"
        for request_id in output.num_scheduled_tokens:
            self._note_starvation(request_id, plan)
        for request in self.scheduler.running:
            assert self.worker.rows[request.request_id].tables == self.tables(request.request_id)
        self.audit()

    def _first_writes(self, request_id: str) -> Iterator[int]:
        """Where each step in flight starts to write into this request's blocks."""
        request = self.scheduler.requests[request_id]
        end = request.num_computed_tokens
        for output, _ in reversed(self.in_flight):
            end -= output.num_scheduled_tokens.get(request_id, 0)
            yield end

    def _note_starvation(self, request_id: str, plan: StepPlan) -> None:
        track = self.planner.tracks.get(request_id)
        if track is None or track.slot is not None or not self.planner._needs_slot:
            return
        tokens = self.scheduler.requests[request_id].num_computed_tokens
        if track.unprotected(tokens, BLOCK) > track.due - self.policy.window:
            self.starved[request_id] = track.epoch

    def _check_target(self, request_id: str, group: int, block: int, block_id: int) -> None:
        """A block is written by nobody but its only holder, and its old content not found again."""
        held = self.managers[group].req_to_blocks[request_id][block]
        assert held.block_id == block_id
        assert held.ref_cnt == 1, "survivors go into a shared block"
        assert held.block_hash is None, "survivors go into a block of the prefix cache"

    def tables(self, request_id: str) -> list[list[int]]:
        return [
            [block.block_id for block in manager.req_to_blocks.get(request_id, ())]
            for manager in self.managers
        ]

    def cached_ids(self, group: int) -> list[int]:
        """The blocks that can be found in the prefix cache for one KV cache group."""
        hashes = {block.block_id: block.block_hash for block in self.pool.blocks}
        return [id_ for id_, key in hashes.items() if key and get_group_id(key) == group]

    def audit(self) -> None:
        """What must hold between any two calls into the scheduler."""
        self._audit_blocks()
        self._audit_prefix_cache()
        self._audit_slots()
        for request_id in list(self.managers[0].req_to_blocks):
            for group, table in enumerate(self.tables(request_id)):
                self._audit_request(request_id, group, table)

    def _audit_blocks(self) -> None:
        held: Counter[int] = Counter()
        for manager in self.managers:
            for table in manager.req_to_blocks.values():
                held.update(block.block_id for block in table if not block.is_null)
        free = {block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()}
        assert len(free) == self.pool.get_num_free_blocks()
        assert len(free) + len(held) == self.usable
        assert not free & set(held)
        assert all(block.ref_cnt == held[block.block_id] for block in self.pool.blocks[1:])

    def _audit_prefix_cache(self) -> None:
        """Whatever can be found there was computed with the full context, and is still there."""
        findable = 0
        for key, cached in self.pool.cached_block_hash_to_block._cache.items():
            for block in cached.values() if isinstance(cached, dict) else [cached]:
                findable += 1
                assert block.block_hash == key
                assert not block.is_null
                cells = ((block.block_id, offset) for offset in range(BLOCK))
                content = [self.worker.bytes[cell] for cell in cells]
                if self.cached.get(key) != content:
                    assert key not in self.cached, "other bytes than what the hash stands for"
                    first, group = content[0].position, get_group_id(key)
                    assert first % BLOCK == 0
                    for position, token in enumerate(content, first):
                        assert (token.group, token.position) == (group, position)
                        assert token.context == EXACT, "the prefix cache returns inexact content"
                    self.cached[key] = content
        hashed = sum(block.block_hash is not None for block in self.pool.blocks)
        assert hashed == findable

    def _audit_slots(self) -> None:
        owned = [t.slot for t in self.planner.tracks.values() if t.slot is not None]
        assert len(owned) == len(set(owned))
        assert not set(owned) & set(self.planner._free_slots)
        assert set(self.planner.tracks) <= set(self.scheduler.requests)

    def _audit_request(self, request_id: str, group: int, table: list[int]) -> None:
        request, track = self.scheduler.requests[request_id], self.planner.tracks.get(request_id)
        held = sum(block_id != 0 for block_id in table)
        if track is None:
            assert held == len(table), "a request that opted out lost blocks"
            return
        assert all(table[: track.protected]), "a protected block was freed"
        assert len(table) - held == track.holes, "groups of layers lose equally many blocks"
        survivors = track.survivors[self.managers[group].layer_group]
        assert all(table[block] for block in survivors)
        newest = max(0, request.num_computed_tokens - self.policy.window) // BLOCK
        assert all(table[newest:]), "a block of the window was freed"
        if self.starved.get(request_id) != track.epoch:
            assert held <= self.peak(request), "a request passed its bound"
