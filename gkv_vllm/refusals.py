# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What eviction cannot be combined with, as data; who prints it is `plugin.py` and `doctor.py`.

Every `Refusal` reads static facts of a finished `VllmConfig`. The README's support matrix is
generated from the same list.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gkv_vllm.compat import SUPPORTED_VLLM
from gkv_vllm.config import KVPolicyConfig

STOCK_WORKERS = {
    "cpu": "vllm.v1.worker.cpu_worker.CPUWorker",
    "cuda": "vllm.v1.worker.gpu_worker.Worker",
}
BACKENDS = {"cpu": ("CPU_ATTN",), "cuda": ("FLASH_ATTN", "TRITON_ATTN")}
"""Attention backends that skip holes, by type of device."""
SKIP_VERSION_CHECK = "GKV_SKIP_VERSION_CHECK"

_PLAIN_CACHE_DTYPES = {"auto", "float16", "bfloat16", "float32"}
_PARTIAL_LAYERS = {
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
    "mamba",
    "mamba2",
    "conv",
    "recurrent",
}
_WORKS = (
    "prefix caching",
    "chunked prefill",
    "preemption",
    "asynchronous scheduling",
    "tensor parallelism",
    "CUDA graphs (FULL and PIECEWISE)",
    "FlashAttention 2 and 3 (FLASH_ATTN), TRITON_ATTN, CPU_ATTN",
    "Model Runner V2 and V1",
    "sliding-window layers beside full-attention layers (left as they are)",
)


class PolicyRefused(ValueError):
    """An engine configuration that a KV policy cannot run with; one sentence per line."""


@dataclass(frozen=True)
class Refusal:
    """One thing a policy cannot run with.

    `sentence` may use `{found}`, which `found` reads from the config."""

    name: str
    applies: Callable[[Any], bool]
    sentence: str
    remedy: str
    found: Callable[[Any], Any] = lambda config: ""

    def text(self, vllm_config: Any) -> str:
        """The sentence that says what and what to do."""
        what = self.sentence.format(found=self.found(vllm_config))
        return f"a KV policy cannot run with {what}; {self.remedy}"


def vllm_version() -> str:
    """The version of the vLLM that would serve."""
    import vllm

    return vllm.__version__


def version_supported(version: str) -> bool:
    """Whether this vLLM is one we were checked against; `0.32.0+cpu` counts as 0.32.0."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    if os.environ.get(SKIP_VERSION_CHECK) == "1":
        return True
    try:
        return SpecifierSet(SUPPORTED_VLLM).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def _rust_front_end(_: Any) -> bool:
    import vllm.envs as envs

    return bool(envs.VLLM_USE_RUST_FRONTEND and envs.VLLM_RUST_FRONTEND_PATH)


def _foreign_backends(config: Any) -> list[str]:
    attention = config.attention_config
    chosen = [attention.backend, *attention.backend_per_kind.values()]
    usable = BACKENDS.get(config.device_config.device_type, ())
    return sorted({backend.name for backend in chosen if backend} - {*usable})


def _no_full_attention(config: Any) -> bool:
    model = config.model_config
    if model.is_attention_free or config.cache_config.sliding_window is not None:
        return True
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ())
    return bool(kinds) and not model.disable_sliding_window and kinds <= _PARTIAL_LAYERS


def _unified_partial_layers(config: Any) -> bool:
    """Whether vLLM would put windowed layers into one group with full ones, holes and all."""
    if not config.scheduler_config.disable_hybrid_kv_cache_manager:
        return False
    text, model = config.model_config.hf_text_config, config.model_config
    kinds = set(getattr(text, "layer_types", None) or ())
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    chunked = getattr(text, "attention_chunk_size", None)
    return bool(
        chunked or (kinds & _PARTIAL_LAYERS or windowed) and not model.disable_sliding_window
    )


def _other_device(config: Any) -> bool:
    return config.device_config.device_type not in STOCK_WORKERS or _is_rocm()


def _is_rocm() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_rocm())


def _custom_worker(config: Any) -> bool:
    stock = STOCK_WORKERS.get(config.device_config.device_type)
    return stock is not None and config.parallel_config.worker_cls != stock


def _settings(config: Any) -> KVPolicyConfig:
    return KVPolicyConfig.from_mapping((config.additional_config or {}).get("kv_policy"))


def _reference_in_graphs(config: Any) -> bool:
    if config.device_config.device_type == "cpu" or config.model_config.enforce_eager:
        return False
    return _settings(config).impl == "reference"


def _records_of_one_rank(config: Any) -> bool:
    settings = _settings(config)
    own_tokens = settings.moves_tokens and settings.scope == "head"
    recorded = settings.record_positions is not None and own_tokens
    return recorded and config.parallel_config.tensor_parallel_size > 1


REFUSALS: list[Refusal] = [
    Refusal(
        "other versions of vLLM",
        lambda _: not version_supported(vllm_version()),
        "vLLM {found}",
        f"install vllm{SUPPORTED_VLLM}, or set {SKIP_VERSION_CHECK}=1 to try it all the same",
        found=lambda _: vllm_version(),
    ),
    Refusal(
        "devices other than NVIDIA GPUs and CPUs",
        _other_device,
        "the device {found!r} yet",
        "use an NVIDIA GPU or vLLM's CPU build",
        found=lambda config: "rocm" if _is_rocm() else config.device_config.device_type,
    ),
    Refusal(
        "pipeline parallelism",
        lambda config: config.parallel_config.pipeline_parallel_size > 1,
        "pipeline parallelism of {found}, since no single worker sees every layer's scores",
        "use --pipeline-parallel-size 1",
        found=lambda config: config.parallel_config.pipeline_parallel_size,
    ),
    Refusal(
        "decode context parallelism",
        lambda config: config.parallel_config.decode_context_parallel_size > 1,
        "decode context parallelism of {found}, which splits every block over workers",
        "use --decode-context-parallel-size 1",
        found=lambda config: config.parallel_config.decode_context_parallel_size,
    ),
    Refusal(
        "prefill context parallelism",
        lambda config: config.parallel_config.prefill_context_parallel_size > 1,
        "prefill context parallelism of {found}, which splits every block over workers",
        "use --prefill-context-parallel-size 1",
        found=lambda config: config.parallel_config.prefill_context_parallel_size,
    ),
    Refusal(
        "dual batch overlap",
        lambda config: config.parallel_config.enable_dbo,
        "dual batch overlap, which splits a step into two batches",
        "remove --enable-dbo",
    ),
    Refusal(
        "speculative decoding",
        lambda config: config.speculative_config is not None,
        "speculative decoding, whose rejected tokens would be scored",
        "remove --speculative-config",
    ),
    Refusal(
        "FlashInfer and every attention backend but FLASH_ATTN, TRITON_ATTN and CPU_ATTN",
        lambda config: bool(_foreign_backends(config)),
        "the attention backend {found} yet",
        "set --attention-backend to FLASH_ATTN or TRITON_ATTN on a GPU, to CPU_ATTN on a CPU",
        found=lambda config: ", ".join(_foreign_backends(config)),
    ),
    Refusal(
        "impl=reference on a GPU with CUDA graphs",
        _reference_in_graphs,
        "the torch reference inside CUDA graphs",
        "add --enforce-eager, or set --kv-impl auto",
    ),
    Refusal(
        "records of tokens kept per head (record_positions) with tensor parallelism",
        _records_of_one_rank,
        "record_positions and tensor parallelism where each head keeps tokens of its own, since "
        "a rank knows only its own heads",
        "use --tensor-parallel-size 1, --kv-scope layer or all, or drop --kv-record-positions",
    ),
    Refusal(
        "quantised KV cache",
        lambda config: config.cache_config.cache_dtype not in _PLAIN_CACHE_DTYPES,
        "a KV cache of type {found!r}, whose keys it cannot score",
        "use --kv-cache-dtype auto",
        found=lambda config: config.cache_config.cache_dtype,
    ),
    Refusal(
        "KV connectors",
        lambda config: config.kv_transfer_config is not None,
        "a KV connector, which would transfer blocks that are gone",
        "remove --kv-transfer-config",
    ),
    Refusal(
        "KV cache offloading",
        lambda config: config.cache_config.kv_offloading_size is not None,
        "KV cache offloading, which would load back what was evicted",
        "remove --kv-offloading-size",
    ),
    Refusal(
        "HiSparse",
        lambda config: config.attention_config.hisparse_config is not None,
        "HiSparse, which keeps its own set of live blocks",
        "remove hisparse_config from --attention-config",
    ),
    Refusal(
        "fast prefill of KV-sharing models",
        lambda config: config.cache_config.kv_sharing_fast_prefill,
        "fast prefill of KV-sharing layers, which skips the queries that score",
        "remove --kv-sharing-fast-prefill",
    ),
    Refusal(
        "windowed or chunked layers with the hybrid KV cache manager off",
        _unified_partial_layers,
        "windowed or chunked layers while the hybrid KV cache manager is off, which puts them into "
        "one group with full attention",
        "remove --disable-hybrid-kv-cache-manager",
    ),
    Refusal(
        "Mamba and linear-attention hybrids",
        lambda config: config.model_config.is_hybrid,
        "Mamba or linear-attention layers yet",
        "use a model of attention layers",
    ),
    Refusal(
        "custom schedulers",
        lambda config: config.scheduler_config.scheduler_cls is not None,
        "the scheduler {found}, since it brings its own",
        "remove --scheduler-cls",
        found=lambda config: config.scheduler_config.scheduler_cls,
    ),
    Refusal(
        "custom workers",
        _custom_worker,
        "the worker {found}, since it brings its own",
        "remove --worker-cls",
        found=lambda config: config.parallel_config.worker_cls,
    ),
    Refusal(
        "the Rust front end",
        _rust_front_end,
        "the Rust front end, which does not check a request's kv_* arguments",
        "unset VLLM_USE_RUST_FRONTEND",
    ),
    Refusal(
        "multi-head latent attention (MLA)",
        lambda config: config.model_config.use_mla,
        "a model of multi-head latent attention (MLA), which caches no keys per head",
        "serve a model with plain or grouped-query attention, or drop --kv-policy",
    ),
    Refusal(
        "encoder-decoder models",
        lambda config: config.model_config.is_encoder_decoder,
        "an encoder-decoder model",
        "serve a decoder-only model, or drop --kv-policy",
    ),
    Refusal(
        "pooling models",
        lambda config: config.model_config.runner_type == "pooling",
        "a pooling model, which generates nothing",
        "use --runner generate, or drop --kv-policy",
    ),
    Refusal(
        "diffusion language models",
        lambda config: config.model_config.is_diffusion or config.diffusion_config is not None,
        "a diffusion language model, which rewrites tokens it has cached",
        "serve an autoregressive model, or drop --kv-policy",
    ),
    Refusal(
        "ALiBi models",
        lambda config: config.model_config.uses_alibi,
        "an ALiBi model, whose attention needs the position of every cached token",
        "serve a model with rotary positions, or drop --kv-policy",
    ),
    Refusal(
        "prefix-LM and bidirectional multimodal models",
        lambda config: config.model_config.is_mm_prefix_lm,
        "a model that attends in both directions over its multimodal prefix",
        "serve a causal model, or drop --kv-policy",
    ),
    Refusal(
        "models whose sliding window spares the prompt (RSWA)",
        lambda config: config.model_config.rswa_window is not None,
        "a model whose sliding window spares the prompt (RSWA), which frees blocks by its own rule",
        "serve another model, or drop --kv-policy",
    ),
    Refusal(
        "models without a full-attention layer",
        _no_full_attention,
        "a model that has no full-attention layer, since there is nothing to evict from",
        "drop --kv-policy: its cache is bounded already",
    ),
]


def collect(vllm_config: Any, config: KVPolicyConfig) -> list[str]:
    """All sentences that apply to this engine; none when no policy was asked for."""
    if not config.active:
        return []
    found = []
    for refusal in REFUSALS:
        try:
            if refusal.applies(vllm_config):
                found.append(refusal.text(vllm_config))
        except AttributeError as error:
            # An unchecked refusal would let through what it exists to stop.
            found.append(f"cannot tell whether a KV policy meets {refusal.name}: {error}")
    return found


def support_matrix() -> str:
    """The README's table: what works with a policy, and what is refused at start-up."""
    rows = [f"| {name} | yes | |" for name in _WORKS]
    rows += [f"| {refusal.name} | refused | {refusal.remedy} |" for refusal in REFUSALS]
    return "\n".join(["| with a policy | | what to do |", "|---|---|---|", *rows])
