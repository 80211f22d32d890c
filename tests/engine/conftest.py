# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Real vLLM configs, KV cache configs and requests for the engine's tests; no model runs here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def base_config(demo_model: Path) -> Any:
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig

    model = ModelConfig(
        model=str(demo_model), skip_tokenizer_init=True, max_model_len=512, dtype="float32"
    )
    scheduler = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=64, max_model_len=512, is_encoder_decoder=False
    )
    cache = CacheConfig(block_size=16, enable_prefix_caching=True)
    return VllmConfig(scheduler_config=scheduler, model_config=model, cache_config=cache)


@pytest.fixture(scope="session")
def vllm_config(base_config: Any) -> Callable[..., Any]:
    """Makes a VllmConfig with other numbers; keywords that name a scheduler setting change it."""

    def make(
        policy: dict[str, Any],
        *,
        block_size: int = 4,
        num_blocks: int = 64,
        max_model_len: int = 512,
        caching: bool = True,
        **scheduler: Any,
    ) -> Any:
        config = copy.copy(base_config)
        config.additional_config = {"kv_policy": policy}
        config.model_config = copy.copy(base_config.model_config)
        config.model_config.max_model_len = max_model_len
        config.cache_config = copy.copy(base_config.cache_config)
        config.cache_config.block_size = block_size
        config.cache_config.num_gpu_blocks = num_blocks
        config.cache_config.enable_prefix_caching = caching
        config.scheduler_config = copy.copy(base_config.scheduler_config)
        for name, value in scheduler.items():
            assert hasattr(config.scheduler_config, name), name
            setattr(config.scheduler_config, name, value)
        return config

    return make


@pytest.fixture(scope="session")
def kv_cache_config() -> Callable[..., Any]:
    """Makes a KVCacheConfig of evictable groups, as the engine core does after profiling."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from gkv_vllm.config import KVPolicyConfig
    from gkv_vllm.engine.block_manager import register_spec
    from gkv_vllm.engine.spec import GKVSpec

    register_spec()

    class Zeroed(KVCacheConfig):
        """As of models whose new blocks are zeroed: nothing live may be among them."""

        needs_kv_cache_zeroing = True

    def make(
        policy: dict[str, Any],
        *,
        block_size: int,
        num_blocks: int,
        layer_groups: tuple[int, ...] = (0,),
    ) -> Any:
        """layer_groups: the layer group of each KV cache group."""
        stock = FullAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        config = KVPolicyConfig.from_mapping(policy)
        return Zeroed(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[
                KVCacheGroupSpec(
                    [f"layer {i}"], GKVSpec.from_full_attention(stock, config, layer_group)
                )
                for i, layer_group in enumerate(layer_groups)
            ],
        )

    return make


@pytest.fixture(scope="session")
def new_request() -> Callable[..., Any]:
    """Makes a vLLM request with block hashes."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hashers: dict[int, Any] = {}

    def make(
        request_id: str,
        prompt: list[int],
        *,
        max_tokens: int = 16,
        block_size: int = 4,
        extra_args: dict[str, Any] | None = None,
        seed: int | None = 0,
    ) -> Any:
        hasher = hashers.setdefault(block_size, get_request_block_hasher(block_size, sha256))
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args, seed=seed
        )
        return Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=params,
            pooling_params=None,
            block_hasher=hasher,
        )

    return make
