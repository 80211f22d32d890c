# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Checks each request's `kv_*` arguments in the API process; a bad one is HTTP 400."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from gkv_vllm import compat

if TYPE_CHECKING:
    from gkv_vllm.config import KVPolicyConfig


def install() -> None:
    """Check every request of this process whose engine has a policy. Idempotent."""
    compat.wrap(compat.PROCESS_INPUTS, _with_request_check)
    compat.wrap(compat.GENERATE, _with_early_check)
    compat.wrap(compat.RESPONSES, _with_early_responses_check)


def _with_request_check(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        check_request(self.vllm_config, params, prompt_tokens=0)
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        check_request(
            self.vllm_config, request.sampling_params, prompt_tokens=_request_tokens(request)
        )
        return request

    return wrapper


def _with_early_check(generate: Callable[..., Any]) -> Callable[..., Any]:
    # generate() is an async generator: its body runs at the first item, when a streaming response
    # has begun. This plain function checks on the call.
    def wrapper(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        check_request(self.vllm_config, sampling_params, prompt_tokens=_prompt_tokens(prompt))
        return generate(self, prompt, sampling_params, *args, **kwargs)

    return wrapper


def _with_early_responses_check(generate: Callable[..., Any]) -> Callable[..., Any]:
    # As above, for the one route that calls AsyncLLM.generate() in a generator of its own.
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(generate).bind(self, *args, **kwargs).arguments
        check_request(
            self.engine_client.vllm_config,
            given["sampling_params"],
            prompt_tokens=_prompt_tokens(given["engine_input"]),
        )
        return generate(self, *args, **kwargs)

    return wrapper


def _request_tokens(request: Any) -> int:
    ids = request.prompt_token_ids
    return len(ids) if ids is not None else len(request.prompt_embeds)


def _prompt_tokens(prompt: Any) -> int:
    """Tokens of a prompt as far as it has been tokenized; process_inputs checks the rest."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    return len(ids) if ids else 0


_last_read: tuple[Any, Any] = (None, None)


def _config_of(additional_config: Any) -> Any:
    """The settings in an additional_config; read once, since every request asks."""
    global _last_read
    if _last_read[0] is not additional_config:
        from gkv_vllm.plugin import read_config

        _last_read = additional_config, read_config(additional_config)
    return _last_read[1]


def check_request(vllm_config: Any, params: Any, *, prompt_tokens: int) -> None:
    """Raise VLLMValidationError (HTTP 400) for bad kv_* arguments or a request that cannot fit."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    from gkv_vllm.config import ConfigError

    config = _config_of(vllm_config.additional_config)
    if not config.active or not isinstance(params, SamplingParams):
        return
    try:
        _check_fits(vllm_config, config, params, prompt_tokens)
    except ConfigError as error:
        raise VLLMValidationError(str(error)) from error


def _check_fits(vllm_config: Any, config: KVPolicyConfig, params: Any, prompt_tokens: int) -> None:
    from gkv_vllm.config import ConfigError
    from gkv_vllm.engine.footprint import peak_blocks
    from gkv_vllm.engine.spec import in_flight_tokens

    cache = vllm_config.cache_config
    policy = config.for_request(params.extra_args, cache.block_size)
    pool = pool_blocks(vllm_config)
    if pool is None or params.max_tokens is None:
        return
    max_tokens = min(params.max_tokens, vllm_config.model_config.max_model_len - prompt_tokens)
    peak = peak_blocks(
        policy,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        block_size=cache.block_size,
        interval=config.interval,
        in_flight_tokens=in_flight_tokens(vllm_config),
    )
    if peak > pool:
        raise ConfigError(
            f"this request may need {peak} KV blocks of {cache.block_size} tokens ({prompt_tokens} "
            f"prompt tokens, max_tokens={max_tokens}, kv_policy="
            f"{config.policy if policy.evict else 'none'}, kv_budget={policy.budget}, "
            f"kv_protect={policy.protect}) but the server has {pool}; lower max_tokens or kv_budget"
        )


def pool_blocks(vllm_config: Any) -> int | None:
    """Blocks that requests of one engine can use, or None before the engine has told."""
    total = vllm_config.cache_config.num_gpu_blocks
    if not total:
        return None
    # vLLM sums over the engines that this client manages; each keeps one null block.
    parallel = vllm_config.parallel_config
    engines = parallel.data_parallel_size
    if parallel.local_engines_only:
        engines = parallel.data_parallel_size_local
    if parallel.data_parallel_rank_local is not None:
        engines = 1  # offline SPMD: one engine per process
    return total // engines - 1
