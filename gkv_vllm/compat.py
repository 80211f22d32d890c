# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Every touch on vLLM's internals as data, and how one is checked or wrapped; no behaviour of ours.

A `Touch` names what we patch, subclass or call, the parameters we rely on, and when it can go. What
the wrappers do stands with their owners (`plugin.py`, `metrics.py`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SUPPORTED_VLLM = ">=0.32,<0.33"
# Set on an installed wrapper, so that a second install is recognised.
_MARK = "__gkv_wrapper__"


@dataclass(frozen=True)
class Touch:
    """One dependence on something vLLM does not promise.

    `target` is "module:Attr.path". `signature` lists the parameter names (or, for a class without
    call, the field names) that we rely on, in no order; empty means existence is enough."""

    target: str
    why: str
    remove_when: str
    signature: tuple[str, ...] = ()
    patched: bool = False


_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_REGISTRY = "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_SPEC = "vllm.v1.kv_cache_interface:FullAttentionSpec"
_CPU_WORKER = "vllm.v1.worker.cpu_worker:CPUWorker"
_CPU_ATTN = "vllm.v1.attention.backends.cpu_attn"
_ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"

ADD_CLI_ARGS = f"{_ENGINE_ARGS}.add_cli_args"
FROM_CLI_ARGS = f"{_ENGINE_ARGS}.from_cli_args"
CREATE_ENGINE_CONFIG = f"{_ENGINE_ARGS}.create_engine_config"
PROCESS_INPUTS = "vllm.v1.engine.input_processor:InputProcessor.process_inputs"
GENERATE = "vllm.v1.engine.async_llm:AsyncLLM.generate"
RESPONSES = (
    "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses._generate_with_builtin_tools"
)
PARSE_ARGS = "vllm.utils.argparse_utils:FlexibleArgumentParser.parse_args"
MANAGER_INIT = "vllm.v1.metrics.loggers:StatLoggerManager.__init__"
RECORD = "vllm.v1.metrics.loggers:StatLoggerManager.record"


def _patched(target: str, why: str, remove_when: str, *signature: str) -> Touch:
    return Touch(target, why, remove_when, signature, patched=True)


_FRONT_END = [
    _patched(ADD_CLI_ARGS, "no public hook adds a CLI flag", "vLLM takes plugin flags", "parser"),
    _patched(
        FROM_CLI_ARGS, "flags must reach additional_config", "vLLM takes plugin flags", "args"
    ),
    _patched(
        PARSE_ARGS,
        "API server processes get the parsed arguments, and load plugins too late to merge flags",
        "vLLM takes plugin flags",
        *("self", "args", "namespace"),
    ),
    _patched(
        CREATE_ENGINE_CONFIG,
        "activation needs the finished VllmConfig, before any process starts",
        "a plugin may veto and amend a VllmConfig",
        "self",
        "usage_context",
        "headless",
    ),
    _patched(
        PROCESS_INPUTS,
        "a request's kv_* arguments are checked where an error is still HTTP 400",
        "vLLM validates extra_args through a plugin hook",
        *("self", "request_id", "prompt", "params"),
    ),
    _patched(
        GENERATE,
        "a streamed request must be refused before its first byte (process_inputs is too late)",
        "vLLM runs process_inputs before it starts a streaming response",
        *("self", "prompt", "sampling_params", "request_id"),
    ),
    _patched(
        RESPONSES,
        "as AsyncLLM.generate, which /v1/responses calls only after its first byte",
        "vLLM runs process_inputs before it starts a streaming response",
        *("self", "engine_input", "sampling_params"),
    ),
    _patched(
        MANAGER_INIT,
        "our metrics are registered beside vLLM's, with the same labels",
        "SchedulerStats carries plugin metrics",
        *("self", "vllm_config", "engine_idxs"),
    ),
    _patched(
        RECORD,
        "no public hook brings a plugin's counters from the engine core to /metrics",
        "SchedulerStats carries plugin metrics",
        *("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
    ),
]

_ENGINE = [
    Touch(
        f"{_SCHEDULER}.schedule",
        "evictions go before admission, and the plan rides on its output",
        "vLLM has a per-step scheduler hook",
        ("self", "throttle_prefills"),
    ),
    Touch(
        f"{_SCHEDULER}.update_from_output",
        "block scores arrive with the model's output",
        "vLLM has a per-step scheduler hook",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    Touch(
        f"{_SCHEDULER}._get_local_prefix_cache_hit",
        "a cached prefix deeper than the bound would be held, and its last queries never seen",
        "vLLM lets a manager limit a hit per request",
        ("self", "request"),
    ),
    Touch(
        f"{_SCHEDULER}._preempt_request",
        "a preemption starts a new epoch",
        "vLLM announces preemptions",
        ("self", "request"),
    ),
    Touch(
        f"{_SCHEDULER}._free_request",
        "the end of a request gives its slot back, however it ends",
        "vLLM announces finished requests",
        ("self", "request"),
    ),
    Touch(
        f"{_SCHEDULER}.add_request",
        "a request's own budget is read once, when it arrives",
        "vLLM announces new requests",
        ("self", "request"),
    ),
    Touch(f"{_SCHEDULER}.make_stats", "our counters ride on it", "as StatLoggerManager.record"),
    Touch(
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
        "a plain Scheduler subclass would turn asynchronous scheduling off",
        "one scheduler class serves both modes",
    ),
    Touch(
        f"{_MANAGER}.cache_blocks",
        "blocks computed after an eviction must not enter the prefix cache",
        "a manager may veto caching",
        ("self", "request", "num_tokens"),
    ),
    Touch(
        f"{_MANAGER}.get_num_blocks_to_allocate",
        "admission must use the bounded footprint",
        "specs bound their own admission",
        ("self", "request_id", "num_tokens", "new_computed_blocks", "apply_admission_cap"),
    ),
    Touch(
        f"{_MANAGER}.pop_blocks_for_free",
        "holes hold the null block, which must not be freed",
        "vLLM frees rows with scattered nulls",
        ("self", "request_id"),
    ),
    Touch(
        f"{_REGISTRY}.register",
        "our spec selects our block manager",
        "never: it is the intended hook",
        ("kvcache_spec_cls", "manager_class", "uniform_type_base_spec"),
    ),
    Touch(
        f"{_REGISTRY}._ensure_registered",
        "registering first would suppress vLLM's own registrations",
        "register() calls it itself",
    ),
    Touch(
        f"{_SPEC}.merge",
        "a merged spec must stay ours, and layer groups must not be merged",
        "merge keeps subclasses",
        ("specs",),
    ),
    Touch(
        f"{_SPEC}.is_uniform_with_collection",
        "each layer group needs a KV cache group, and so a block table, of its own",
        "never: it is the intended override",
        ("self", "kv_cache_specs"),
    ),
    Touch(
        f"{_POOL}.free_blocks",
        "an evicted block of a running request goes back to the pool",
        "managers free blocks in the middle of a request",
        ("self", "ordered_blocks"),
    ),
    Touch(
        f"{_POOL}.get_new_blocks",
        "survivors of a shared block need a block that nobody else reads",
        "managers allocate outside allocate_slots",
        ("self", "num_blocks"),
    ),
    Touch(
        f"{_POOL}.evict_blocks",
        "a block whose tokens were replaced must not be found by its old hash",
        "never: it is the intended hook",
        ("self", "block_ids"),
    ),
    Touch(
        f"{_SPEC}.max_memory_usage_bytes",
        'the start-up line "Maximum concurrency" must be true',
        "never: it is the intended override",
        ("self", "vllm_config"),
    ),
    Touch(
        "vllm.v1.metrics.stats:SchedulerStats",
        "its one free-form dict carries our counters to the API process",
        "SchedulerStats carries plugin metrics",
        ("num_kv_fetch_reqs_by_stage",),
    ),
]

_WORKER = [
    Touch(
        f"{_CPU_WORKER}.{method}",
        why,
        "vLLM has worker hooks for plugins",
        ("self", *parameters),
    )
    for method, why, parameters in [
        ("determine_available_memory", "the rings and the history need room", ()),
        ("get_kv_cache_spec", "full-attention layers get our spec", ()),
        ("initialize_from_config", "rings are made when the pool is known", ("kv_cache_config",)),
        ("execute_model", "the plan is applied before the step's inputs", ("scheduler_output",)),
        ("sample_tokens", "scores ride on its output", ("grammar_output",)),
    ]
] + [
    Touch(
        "vllm.v1.worker.gpu_input_batch:CachedRequestState",
        "holes are nulled in the table that the V1 runner rebuilds its rows from",
        "the runner takes block drops from the scheduler",
        ("block_ids",),
    ),
    Touch(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        "its tables and lengths are replaced by live ones",
        "vLLM builds live block tables",
        (
            *("query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "max_seq_len"),
            *("block_table_tensor", "_num_computed_tokens_cache"),
        ),
    ),
    Touch(
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        "it remembers the stock backend of an engine that ran in this process before",
        "register_backend clears it",
    ),
    Touch(
        f"{_CPU_ATTN}:CPUAttentionBackend",
        "we subclass it to skip holes",
        "vLLM builds live block tables",
    ),
    Touch(
        f"{_CPU_ATTN}:CPUAttentionMetadataBuilder.build",
        "the live table replaces the block table here",
        "vLLM builds live block tables",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Touch(
        f"{_CPU_ATTN}:CPUAttentionBackendImpl.forward",
        "the window's queries are kept here",
        "attention layers take an observer",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    Touch(
        "vllm.v1.attention.backends.registry:register_backend",
        "replaces the class behind CPU_ATTN",
        "never: it is the intended hook",
        ("backend", "class_path"),
    ),
]

TOUCHES: list[Touch] = [*_FRONT_END, *_ENGINE, *_WORKER]


def resolve(target: str) -> tuple[Any, str, Any]:
    """The owner, last name and raw attribute (descriptors unopened) that "module:A.b" points at."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    return owner, name, inspect.getattr_static(owner, name)


def check_touch(touch: Touch) -> str | None:
    """A sentence about what no longer fits, or None. Imports the target's module."""
    try:
        owner, name, _ = resolve(touch.target)
    except (ImportError, AttributeError) as error:
        return f"{touch.target} is gone ({error}); needed because: {touch.why}"
    present = _names(getattr(owner, name))
    missing = [parameter for parameter in touch.signature if parameter not in present]
    if missing:
        return (
            f"{touch.target} no longer has {', '.join(missing)} (it has {', '.join(present)}); "
            f"needed because: {touch.why}"
        )
    return None


def _names(target: Any) -> list[str]:
    if inspect.isclass(target):
        return list(getattr(target, "__dataclass_fields__", {}))
    return list(inspect.signature(target).parameters)


def wrap(target: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    """Replace the function at `target` by `around(function)`, once per process.

    Keeps the kind of method (static, class, plain) and `__wrapped__`. Returns False when our
    wrapper is already there, which makes installing twice harmless."""
    owner, name, raw = resolve(target)
    kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
    original = raw.__func__ if kind else raw
    if getattr(original, _MARK, False):
        return False
    wrapper = functools.wraps(original)(around(original))
    setattr(wrapper, _MARK, True)
    setattr(owner, name, kind(wrapper) if kind else wrapper)
    return True


def unwrap(target: str) -> bool:
    """Undo `wrap`; False when nothing of ours is there. Used by tests and by the doctor."""
    owner, name, raw = resolve(target)
    kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
    wrapper = raw.__func__ if kind else raw
    if not getattr(wrapper, _MARK, False):
        return False
    setattr(owner, name, kind(wrapper.__wrapped__) if kind else wrapper.__wrapped__)
    return True


def wrapped(target: str) -> bool:
    """Whether our wrapper is installed at `target`."""
    raw = resolve(target)[2]
    return bool(getattr(getattr(raw, "__func__", raw), _MARK, False))
