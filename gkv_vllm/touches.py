# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Every touch on vLLM's internals as data; how one is checked or wrapped is in `compat.py`."""

from __future__ import annotations

from dataclasses import dataclass

SUPPORTED_VLLM = ">=0.32,<0.33"


@dataclass(frozen=True)
class Touch:
    """One dependence on something vLLM does not promise.

    `target` is "module:Attr.path". `signature` lists the parameter names (or, for a class without
    call, the field names) that we rely on, in no order; empty means existence is enough.
    `attributes` are those that a class gives its instances, which only its source shows."""

    target: str
    why: str
    remove_when: str
    signature: tuple[str, ...] = ()
    patched: bool = False
    attributes: tuple[str, ...] = ()


_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_REGISTRY = "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_SPEC = "vllm.v1.kv_cache_interface:FullAttentionSpec"
_WORKERS = ("vllm.v1.worker.cpu_worker:CPUWorker", "vllm.v1.worker.gpu_worker:Worker")
_BACKENDS = "vllm.v1.attention.backends"
_V2 = "vllm.v1.worker.gpu"
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
        f"{worker}.{method}",
        why,
        "vLLM has worker hooks for plugins",
        ("self", *parameters),
    )
    for worker in _WORKERS
    for method, why, parameters in [
        ("determine_available_memory", "the rings and the history need room", ()),
        ("get_kv_cache_spec", "full-attention layers get our spec", ()),
        ("initialize_from_config", "rings are made when the pool is known", ("kv_cache_config",)),
        ("execute_model", "the plan is applied before the step's inputs", ("scheduler_output",)),
        ("sample_tokens", "scores ride on its output", ("grammar_output",)),
    ]
]

_BLOCK_DROPS = "the runner takes block drops from the scheduler"
_LIVE_TABLES = "vLLM builds live block tables"

_V1_RUNNER = [
    Touch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "the V1 runner's requests and its batch are looked up",
        _BLOCK_DROPS,
        attributes=("requests", "input_batch", "attn_groups", "device"),
    ),
    Touch(
        "vllm.v1.worker.gpu_input_batch:CachedRequestState",
        "holes are nulled in the table that the V1 runner rebuilds its rows from",
        _BLOCK_DROPS,
        ("block_ids",),
    ),
    Touch(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "holes are nulled in the row of a request that is in the batch",
        _BLOCK_DROPS,
        attributes=("req_id_to_index", "block_table"),
    ),
    Touch("vllm.v1.worker.gpu_input_batch:InputBatch.req_ids", "as InputBatch", _BLOCK_DROPS),
    Touch(
        "vllm.v1.worker.block_table:MultiGroupBlockTable.__getitem__",
        "a KV cache group has a table of its own",
        _BLOCK_DROPS,
    ),
    Touch(
        "vllm.v1.worker.block_table:BlockTable",
        "its NumPy side is written",
        _BLOCK_DROPS,
        attributes=("block_table",),
    ),
    Touch(
        "vllm.v1.worker.gpu_model_runner:AsyncGPUModelRunnerOutput",
        "the report rides on the output that it promises",
        "worker outputs carry plugin data",
        attributes=("_model_runner_output",),
    ),
]

_V2_RUNNER = [
    Touch(
        f"{_V2}.model_runner:GPUModelRunner",
        "Model Runner V2's requests and tables are looked up",
        _BLOCK_DROPS,
        attributes=("req_states", "block_tables", "attn_groups", "max_num_reqs"),
    ),
    Touch(
        f"{_V2}.states:RequestState",
        "rows of the tables belong to indices of requests",
        _BLOCK_DROPS,
        attributes=("req_id_to_index", "index_to_req_id"),
    ),
    Touch(
        f"{_V2}.block_table:BlockTables",
        "a KV cache group has a table of its own",
        _BLOCK_DROPS,
        attributes=("block_tables",),
    ),
    Touch(
        f"{_V2}.block_table:BlockTables.apply_staged_writes",
        "holes reach the device with vLLM's own new blocks, before inputs are built",
        _BLOCK_DROPS,
    ),
    Touch(
        f"{_V2}.buffer_utils:StagedWriteTensor.stage_write",
        "a row on the device is written by staging",
        _BLOCK_DROPS,
        ("self", "index", "start", "x"),
    ),
    Touch(
        f"{_V2}.buffer_utils:StagedWriteTensor",
        "a row is read on the device",
        _BLOCK_DROPS,
        attributes=("gpu",),
    ),
    Touch(
        f"{_V2}.async_utils:AsyncOutput",
        "the report rides on the output that it promises",
        "worker outputs carry plugin data",
        attributes=("model_runner_output",),
    ),
]

_LAYERS = [
    Touch(
        "vllm.v1.worker.gpu_worker:Worker",
        "its runner is looked into, by its kind",
        "vLLM has worker hooks for plugins",
        attributes=("model_runner", "use_v2_model_runner"),
    ),
    Touch(
        "vllm.v1.outputs:AsyncModelRunnerOutput",
        "the report rides on what it promises, not on the promise",
        "worker outputs carry plugin data",
    ),
    Touch(
        "vllm.model_executor.layers.attention.attention:Attention",
        "a layer's cache is scored, and its implementation shows the queries",
        "attention layers take an observer",
        attributes=("impl", "kv_cache", "kv_sharing_target_layer_name"),
    ),
    Touch(
        "vllm.config.compilation:CompilationConfig",
        "its layers are the model's, and a CUDA graph pads a batch to its sizes",
        "vLLM hands plugins its attention layers",
        ("static_forward_context", "max_cudagraph_capture_size"),
    ),
    Touch(
        "vllm.distributed.parallel_state:get_tp_group",
        "ranks that share a kept set agree on its scores",
        "never: it is the intended call",
    ),
    Touch(
        "vllm.v1.worker.utils:AttentionGroup",
        "the builders of a KV cache group squeeze its table",
        _LIVE_TABLES,
        ("metadata_builders",),
    ),
    Touch(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        "its tables and lengths are replaced by live ones; V2 says which requests its rows are",
        _LIVE_TABLES,
        (
            *("query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound"),
            *("max_seq_len", "block_table_tensor", "_num_computed_tokens_cache", "req_idx"),
        ),
    ),
    Touch(
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        "it remembers the stock backend of an engine that ran in this process before",
        "register_backend clears it",
    ),
    Touch(
        f"{_BACKENDS}.registry:register_backend",
        "replaces the classes behind CPU_ATTN, FLASH_ATTN and TRITON_ATTN",
        "never: it is the intended hook",
        ("backend", "class_path"),
    ),
]

_ATTENTION = [
    touch
    for module, backend, builder, impl in [
        (
            f"{_BACKENDS}.cpu_attn",
            *("CPUAttentionBackend", "CPUAttentionMetadataBuilder", "CPUAttentionBackendImpl"),
        ),
        (
            f"{_BACKENDS}.flash_attn",
            *("FlashAttentionBackend", "FlashAttentionMetadataBuilder", "FlashAttentionImpl"),
        ),
        (
            f"{_BACKENDS}.triton_attn",
            *("TritonAttentionBackend", "TritonAttentionMetadataBuilder", "TritonAttentionImpl"),
        ),
    ]
    for touch in [
        Touch(f"{module}:{backend}", "we subclass it to skip holes", _LIVE_TABLES),
        Touch(
            f"{module}:{builder}.build",
            "the live table replaces the block table here",
            _LIVE_TABLES,
            ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        ),
        Touch(
            f"{module}:{impl}.forward",
            "the window's queries are kept here",
            "attention layers take an observer",
            ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
        ),
        Touch(
            f"{module}:{impl}",
            "its numbers are those of the scores, and ALiBi is refused",
            "attention layers take an observer",
            attributes=(
                *("num_heads", "head_size", "num_kv_heads", "scale", "logits_soft_cap"),
                "alibi_slopes",
            ),
        ),
    ]
]

TOUCHES: list[Touch] = [
    *_FRONT_END,
    *_ENGINE,
    *_WORKER,
    *_V1_RUNNER,
    *_V2_RUNNER,
    *_LAYERS,
    *_ATTENTION,
]
