# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Runs batches of requests through one engine in a process of its own, and records each eviction.

`record` starts that process; a batch is plain data, and so is what comes back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RESULT = "recorded: "
INTERPRETER = Path(__file__).parents[1] / "triton_cpu"
"""A Triton backend that is not installed; its README says what it is for."""

RUNNERS = {
    "V1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    "V2": {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "TRITON_DEFAULT_BACKEND": "cpu",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(INTERPRETER), os.environ.get("PYTHONPATH")])
        ),
    },
}
"""vLLM's model runners, and what the environment of a process has to say to get each."""


@dataclass
class Batch:
    """Requests that run together, to their ends, and start with an empty prefix cache."""

    requests: list[dict[str, Any]]
    first: list[dict[str, Any]] = field(default_factory=list)
    """Requests that run before, so that their prefixes are cached."""
    abort: dict[int, int] = field(default_factory=dict)
    """Which requests are aborted, and after how many steps."""
    pool: int | None = None
    """How many blocks of the pool the batch gets; None for all."""


def record(
    model: Path,
    batches: dict[str, Batch],
    num_blocks: int,
    *,
    runner: str,
    kv_policy: dict[str, Any] | None = None,
    plugin: bool = True,
    asynchronous: bool = False,
    like_a_gpu: bool = False,
) -> dict[str, Any]:
    """The batches, one after the other, through one engine: per batch what `recorded` returns.

    Without `plugin` vLLM does not load us. `asynchronous` schedules a step before the last one's
    tokens are known, which vLLM does not do on a CPU by itself. `like_a_gpu` takes a GPU's path
    (see `take_the_path_of_a_gpu`)."""
    from .harness import ENGINE_ENVIRONMENT

    job = {
        "model": str(model),
        "num_blocks": num_blocks,
        "kv_policy": kv_policy,
        "asynchronous": asynchronous,
        "like_a_gpu": like_a_gpu,
        "batches": {name: asdict(batch) for name, batch in batches.items()},
    }
    only = {} if plugin else {"VLLM_PLUGINS": "triton_cpu_interpreter"}
    result = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(job),
        env={**os.environ, **ENGINE_ENVIRONMENT, **RUNNERS[runner], **only},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    (line,) = [x for x in result.stdout.splitlines() if x.startswith(RESULT)]
    return json.loads(line.removeprefix(RESULT))


# ---- in the other process


def recorded(engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Run one batch.

    outputs: per request `harness.completed`, None if it was aborted.
    events: per request its evictions in order: the blocks that `left` (per layer group) and, if
        tokens move, the `candidates`, their `targets`, which of these are `fresh` blocks, and the
        tokens `kept` (per layer and head).
    preempted: per request, for each time it was, how many evictions it had had.
    holes: how many rows of the batches had holes; miscounted: in how many rows the runner adapter
        counts other holes than the live lengths say.
    pool, free: blocks that were free at the start and at the end.
    cached: how many blocks stayed in the prefix cache from start to end; changed: how many of them
        hold other bytes than they did.
    """
    import torch

    if batch["first"]:
        engine.run(batch["first"])
    hold_back = 0 if batch["pool"] is None else engine.pool.get_num_free_blocks() - batch["pool"]
    held_back = engine.pool.get_new_blocks(hold_back)
    pool = engine.pool.get_num_free_blocks()
    hashes = {b.block_id: b.block_hash for b in engine.pool.blocks if b.block_hash is not None}
    before = [cache.clone() for cache in engine.key_value_caches()]
    log = EvictionLog(engine)
    with ExitStack() as watching:
        log.watch(watching)
        outputs, order = run_and_abort(engine, batch)
    cached = [id_ for id_, hash_ in hashes.items() if engine.pool.blocks[id_].block_hash == hash_]
    changed = sum(
        any(
            not torch.equal(now[id_], then[id_])
            for now, then in zip(engine.key_value_caches(), before, strict=True)
        )
        for id_ in cached
    )
    free = engine.pool.get_num_free_blocks()
    engine.pool.free_blocks(held_back)
    engine.forget_cache()
    return {
        "outputs": outputs,
        "events": [log.events.get(id_, []) for id_ in order],
        "preempted": [log.preempted.get(id_, []) for id_ in order],
        "holes": log.holes,
        "miscounted": log.miscounted,
        "steps": log.steps,
        "free": free,
        "pool": pool,
        "cached": len(cached),
        "changed": changed,
    }


def run_and_abort(engine: Any, batch: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """The outputs of a batch, and the ids of its requests."""
    from harness import completed

    order = [engine.add(request) for request in batch["requests"]]
    abort_after = {order[int(index)]: step for index, step in batch["abort"].items()}
    done: dict[str, Any] = {}
    step = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = completed(output)
        step += 1
        ids = [id_ for id_, after in abort_after.items() if after == step]
        if ids:
            engine.llm.llm_engine.abort_request(ids, internal=True)
    outputs = [done.get(id_.rsplit("-", 1)[0]) for id_ in order]
    return [None if id_ in abort_after else o for id_, o in zip(order, outputs, strict=True)], order


class EvictionLog:
    """What the scheduler decided and what the worker kept, by request."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.preempted: dict[str, list[int]] = {}
        self.steps = 0
        self.holes = 0
        self.miscounted = 0
        self._moved: list[Any] = []

    def watch(self, stack: ExitStack) -> None:
        stack.enter_context(self.engine.each_schedule(self._scheduled))
        if getattr(self.engine.worker, "evictor", None) is not None:
            stack.enter_context(self.engine.each_compaction(self._moved.append))
            stack.enter_context(self.engine.each_begin(self._begun))
            stack.enter_context(each_preparation(self.engine.runner, self._prepared))

    def _scheduled(self, output: Any) -> None:
        self.steps += 1
        for request_id in output.preempted_req_ids or ():
            events = len(self.events.get(request_id, ()))
            self.preempted.setdefault(request_id, []).append(events)
        plan = getattr(output, "gkv_plan", None)
        for request_id, left in (plan.drops if plan else {}).items():
            event: dict[str, Any] = {"left": list(left)}
            if order := plan.compact.get(request_id):
                event["candidates"] = order.selection.candidates
                event["targets"] = order.targets
                event["fresh"] = sorted(set().union(*order.fresh.values()))
            self.events.setdefault(request_id, []).append(event)

    def _begun(self, plan: Any) -> None:
        """The plan was carried out: which tokens stayed, in the order of its compactions."""
        moving = [id_ for id_, order in (plan.compact if plan else {}).items() if order.targets]
        for request_id, kept in zip(moving, self._moved, strict=True):
            waiting = [e for e in self.events[request_id] if e.get("targets") and "kept" not in e]
            waiting[0]["kept"] = kept.tolist()
        self._moved.clear()

    def _prepared(self, metadata: Any, live: Any) -> None:
        gone = (metadata.seq_lens - live.seq_lens).numpy()[: metadata.num_reqs]
        missing = gone // self.engine.scheduler.block_size
        counted = self.engine.worker.evictor.holes(metadata)
        counted = np.zeros_like(missing) if counted is None else counted
        self.holes += int((missing > 0).sum())
        self.miscounted += int((counted != missing).sum())


@contextmanager
def each_preparation(runner: Any, look: Callable[[Any, Any], None]) -> Iterator[None]:
    """Call `look(metadata, live)` for each KV cache group of each batch."""
    builders = [
        builder
        for groups in runner.attn_groups
        for group in groups
        for builder in group.metadata_builders
    ]
    originals = [builder.prepare for builder in builders]

    def watched(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def prepare(metadata: Any) -> Any:
            live = original(metadata)
            look(metadata, live)
            return live

        return prepare

    for builder, original in zip(builders, originals, strict=True):
        builder.prepare = watched(original)
    try:
        yield
    finally:
        for builder, original in zip(builders, originals, strict=True):
            builder.prepare = original


def schedule_ahead() -> None:
    """Let vLLM's CPU platform keep the asynchronous scheduling that it switches off."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def checked(cls: Any, vllm_config: Any) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    CpuPlatform.check_and_update_config = classmethod(checked)


def take_the_path_of_a_gpu() -> None:
    """TRITON_ATTN on its own cache layout, and what the worker does where it must not wait.

    All of it in Triton's interpreter, CUDA graphs excepted."""
    import torch
    from gkv_vllm.triton_kernels import attention_mass
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.ops import triton_unified_attention

    from gkv_vllm.attention import gpu
    from gkv_vllm.worker.worker import EvictionWorkerMixin

    gpu.register()
    chosen = AttentionBackendEnum.TRITON_ATTN.get_path()
    CpuPlatform.get_attn_backend_cls = classmethod(lambda *_, **__: chosen)
    # Here programs take turns: few of them, each with many keys at a time.
    triton_attn.MIN_LAUNCH_GRID_SIZE_2D = 0
    triton_unified_attention._get_tile_size = lambda *_, **__: 256
    attention_mass.PROGRAMS = 1
    # Asked by what writes the cache, for the size of its tiles.
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    EvictionWorkerMixin.on_gpu = True


def main() -> None:
    from harness import InProcessEngine

    job = json.load(sys.stdin)
    if job["like_a_gpu"]:
        take_the_path_of_a_gpu()
    if job["asynchronous"]:
        schedule_ahead()
    engine = InProcessEngine(
        Path(job["model"]),
        num_blocks=job["num_blocks"],
        kv_policy=job["kv_policy"],
        arguments={"async_scheduling": job["asynchronous"]},
    )
    attention = engine.worker.vllm_config.compilation_config.static_forward_context
    result = {
        "runner": type(engine.runner).__module__,
        "scheduler": type(engine.scheduler).__name__,
        "operators": engine.worker.evictor.scorer.ops.name if job["kv_policy"] else None,
        "attention": sorted({type(layer.impl).__name__ for layer in attention.values()}),
        "batches": {name: recorded(engine, batch) for name, batch in job["batches"].items()},
    }
    print(f"\n{RESULT}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
