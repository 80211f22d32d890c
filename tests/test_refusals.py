# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Each thing a policy cannot run with is refused in one sentence, and nothing else is refused."""

from types import SimpleNamespace

import pytest

from gkv_vllm import refusals
from gkv_vllm.config import KVPolicyConfig
from gkv_vllm.refusals import REFUSALS, collect, support_matrix

GKV = KVPolicyConfig(policy="gkv")


def backend(name):
    return SimpleNamespace(name=name)


def healthy():
    """A stand-in for a VllmConfig that a policy runs with; one attribute is spoilt per test."""
    return SimpleNamespace(
        use_v2_model_runner=False,
        additional_config={"kv_policy": {"policy": "gkv"}},
        speculative_config=None,
        kv_transfer_config=None,
        diffusion_config=None,
        device_config=SimpleNamespace(device_type="cpu"),
        attention_config=SimpleNamespace(backend=None, backend_per_kind={}, hisparse_config=None),
        cache_config=SimpleNamespace(
            cache_dtype="auto",
            sliding_window=None,
            kv_offloading_size=None,
            kv_sharing_fast_prefill=False,
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=None, disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            worker_cls=refusals.STOCK_WORKERS["cpu"],
        ),
        model_config=SimpleNamespace(
            use_mla=False,
            is_encoder_decoder=False,
            is_diffusion=False,
            is_attention_free=False,
            is_mm_prefix_lm=False,
            uses_alibi=False,
            runner_type="generate",
            rswa_window=None,
            disable_sliding_window=False,
            hf_text_config=SimpleNamespace(),
            is_hybrid=False,
            enforce_eager=False,
        ),
    )


def spoil(config, path, value):
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent)
    setattr(config, name, value)


# path, value, the refusal's name, what the sentence must hold
SPOILT = [
    ("device_config.device_type", "xpu", "devices other than NVIDIA GPUs and CPUs", "'xpu'"),
    ("parallel_config.pipeline_parallel_size", 4, "pipeline parallelism", "of 4"),
    ("parallel_config.decode_context_parallel_size", 2, "decode context parallelism", "of 2"),
    ("parallel_config.prefill_context_parallel_size", 2, "prefill context parallelism", "of 2"),
    ("parallel_config.enable_dbo", True, "dual batch overlap", "--enable-dbo"),
    ("speculative_config", "something", "speculative decoding", "--speculative-config"),
    (
        "attention_config.backend",
        backend("FLASHINFER"),
        "FlashInfer and every attention backend but FLASH_ATTN, TRITON_ATTN and CPU_ATTN",
        "FLASHINFER",
    ),
    (
        "attention_config.backend_per_kind",
        {"full_attention": backend("TRITON_ATTN")},
        "FlashInfer and every attention backend but FLASH_ATTN, TRITON_ATTN and CPU_ATTN",
        "TRITON_ATTN",
    ),
    ("cache_config.cache_dtype", "fp8", "quantised KV cache", "'fp8'"),
    ("cache_config.cache_dtype", "int8_per_token_head", "quantised KV cache", "'int8"),
    ("kv_transfer_config", "something", "KV connectors", "--kv-transfer-config"),
    ("cache_config.kv_offloading_size", 1.0, "KV cache offloading", "--kv-offloading-size"),
    ("attention_config.hisparse_config", "something", "HiSparse", "hisparse_config"),
    (
        "cache_config.kv_sharing_fast_prefill",
        True,
        "fast prefill of KV-sharing models",
        "--kv-sharing-fast-prefill",
    ),
    (
        "model_config.is_hybrid",
        True,
        "Mamba and linear-attention hybrids",
        "Mamba or linear-attention layers",
    ),
    ("scheduler_config.scheduler_cls", "a.B", "custom schedulers", "the scheduler a.B"),
    ("parallel_config.worker_cls", "a.W", "custom workers", "the worker a.W"),
    ("model_config.use_mla", True, "multi-head latent attention (MLA)", "MLA"),
    ("model_config.is_encoder_decoder", True, "encoder-decoder models", "decoder-only"),
    ("model_config.runner_type", "pooling", "pooling models", "--runner generate"),
    ("model_config.is_diffusion", True, "diffusion language models", "diffusion"),
    ("diffusion_config", "something", "diffusion language models", "diffusion"),
    ("model_config.uses_alibi", True, "ALiBi models", "rotary"),
    (
        "model_config.is_mm_prefix_lm",
        True,
        "prefix-LM and bidirectional multimodal models",
        "both directions",
    ),
    (
        "model_config.rswa_window",
        128,
        "models whose sliding window spares the prompt (RSWA)",
        "RSWA",
    ),
    ("model_config.is_attention_free", True, "models without a full-attention layer", "drop"),
    ("cache_config.sliding_window", 4096, "models without a full-attention layer", "drop"),
    (
        "model_config.hf_text_config.layer_types",
        ["sliding_attention", "linear_attention"],
        "models without a full-attention layer",
        "drop",
    ),
]


def test_a_healthy_config_is_not_refused():
    assert collect(healthy(), GKV) == []


@pytest.mark.parametrize(("path", "value", "name", "says"), SPOILT, ids=lambda v: str(v)[:40])
def test_one_spoilt_attribute_gives_exactly_its_sentence(path, value, name, says):
    config = healthy()
    spoil(config, path, value)
    applying = [refusal for refusal in REFUSALS if refusal.applies(config)]
    assert [refusal.name for refusal in applying] == [name]
    (sentence,) = collect(config, GKV)
    assert says in sentence and applying[0].remedy in sentence
    assert "\n" not in sentence and "{" not in sentence


def on_gpu(**policy):
    config = healthy()
    spoil(config, "device_config.device_type", "cuda")
    spoil(config, "parallel_config.worker_cls", refusals.STOCK_WORKERS["cuda"])
    config.additional_config = {"kv_policy": policy}
    return config


@pytest.mark.parametrize("policy", ["gkv", "h2o"])
@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN"])
def test_a_gpu_is_not_refused(name, policy):
    config = on_gpu(policy=policy)
    spoil(config, "attention_config.backend", backend(name))
    assert collect(config, KVPolicyConfig(policy=policy)) == []


def test_a_backend_of_another_device_is_refused():
    config = on_gpu(policy="gkv")
    spoil(config, "attention_config.backend", backend("CPU_ATTN"))
    (sentence,) = collect(config, GKV)
    assert "CPU_ATTN" in sentence and "FLASH_ATTN" in sentence


def test_the_reference_in_cuda_graphs_is_refused():
    config = on_gpu(policy="gkv", impl="reference")
    assert names_of(config) == ["impl=reference on a GPU with CUDA graphs"]
    spoil(config, "model_config.enforce_eager", True)
    assert names_of(config) == []


def test_records_of_one_rank_are_refused():
    config = healthy()
    config.parallel_config.tensor_parallel_size = 2
    config.additional_config = {"kv_policy": {"policy": "gkv", "record_positions": "records"}}
    assert names_of(config) == [RECORDS_OF_ONE_RANK]
    for changed in ({"granularity": "block"}, {"scope": "layer"}, {"record_positions": None}):
        given = {"policy": "gkv", "record_positions": "records", **changed}
        config.additional_config = {"kv_policy": given}
        assert names_of(config) == []


RECORDS_OF_ONE_RANK = "records of tokens kept per head (record_positions) with tensor parallelism"


def names_of(config):
    return [refusal.name for refusal in REFUSALS if refusal.applies(config)]


def test_version_is_refused_with_the_override_named(monkeypatch):
    monkeypatch.setattr(refusals, "vllm_version", lambda: "0.33.1")
    (sentence,) = collect(healthy(), GKV)
    assert "vLLM 0.33.1" in sentence and "GKV_SKIP_VERSION_CHECK=1" in sentence
    monkeypatch.setenv("GKV_SKIP_VERSION_CHECK", "1")
    assert collect(healthy(), GKV) == []


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.32.0", True),
        ("0.32.0+cpu", True),
        ("0.32.7.dev3+gabc", True),
        ("0.31.9", False),
        ("0.33.0", False),
        ("0.33.0rc1", False),
        ("1.0", False),
        ("dev", False),
    ],
)
def test_supported_versions(version, supported, monkeypatch):
    monkeypatch.delenv("GKV_SKIP_VERSION_CHECK", raising=False)
    assert refusals.version_supported(version) is supported


def test_the_rust_front_end_is_refused(monkeypatch):
    import vllm.envs as envs

    monkeypatch.setitem(envs.__dict__, "VLLM_USE_RUST_FRONTEND", True)
    monkeypatch.setitem(envs.__dict__, "VLLM_RUST_FRONTEND_PATH", "/bin/vllm-rs")
    (sentence,) = collect(healthy(), GKV)
    assert "Rust front end" in sentence and "VLLM_USE_RUST_FRONTEND" in sentence


def test_all_that_apply_are_told_together():
    config = healthy()
    spoil(config, "model_config.use_mla", True)
    spoil(config, "parallel_config.pipeline_parallel_size", 2)
    spoil(config, "speculative_config", object())
    assert len(collect(config, GKV)) == 3


def test_nothing_is_refused_without_a_policy():
    config = healthy()
    spoil(config, "model_config.use_mla", True)
    assert collect(config, KVPolicyConfig()) == []


def test_a_fact_that_cannot_be_read_is_refused_rather_than_passed():
    config = healthy()
    del config.model_config.use_mla
    (sentence,) = collect(config, GKV)
    assert "cannot tell" in sentence and "use_mla" in sentence


@pytest.mark.parametrize(
    "layer_types",
    [None, [], ["full_attention"], ["sliding_attention", "full_attention"]],
    ids=str,
)
def test_sliding_layers_beside_full_ones_are_left_alone(layer_types):
    config = healthy()
    config.model_config.hf_text_config.layer_types = layer_types
    assert collect(config, GKV) == []


def test_disabled_sliding_windows_are_full_attention():
    config = healthy()
    config.model_config.hf_text_config.layer_types = ["sliding_attention"]
    config.model_config.disable_sliding_window = True
    assert collect(config, GKV) == []


WITHOUT_HYBRID_MANAGER = "windowed or chunked layers with the hybrid KV cache manager off"


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ({}, False),
        ({"layer_types": ["full_attention"]}, False),
        ({"sliding_window": 4096, "use_sliding_window": False}, False),
        ({"sliding_window": 4096}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"attention_chunk_size": 8192}, True),
    ],
    ids=str,
)
def test_windowed_layers_never_share_a_group_with_evictable_ones(text, refused):
    config = healthy()
    vars(config.model_config.hf_text_config).update(text)
    assert collect(config, GKV) == []
    config.scheduler_config.disable_hybrid_kv_cache_manager = True
    applying = [refusal.name for refusal in REFUSALS if refusal.applies(config)]
    assert applying == ([WITHOUT_HYBRID_MANAGER] if refused else [])


@pytest.mark.parametrize("cache_dtype", ["auto", "bfloat16", "float16"])
def test_unquantised_caches_and_our_backend_pass(cache_dtype):
    config = healthy()
    config.cache_config.cache_dtype = cache_dtype
    config.attention_config.backend = backend("CPU_ATTN")
    assert collect(config, GKV) == []


def test_every_refusal_has_a_test():
    tested = {name for _, _, name, _ in SPOILT} | {
        "other versions of vLLM",
        "the Rust front end",
        "impl=reference on a GPU with CUDA graphs",
        RECORDS_OF_ONE_RANK,
        WITHOUT_HYBRID_MANAGER,
    }
    assert {refusal.name for refusal in REFUSALS} == tested


def test_the_matrix_has_a_row_for_every_refusal():
    matrix = support_matrix()
    for refusal in REFUSALS:
        assert f"| {refusal.name} | refused | {refusal.remedy} |" in matrix
    assert {line.count("|") for line in matrix.splitlines()} == {4}
