# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The entry point: flags and activation; requests are checked in `request_check`.

`register()` only wraps methods that read the command line. Nothing else happens until a finished
`VllmConfig` asks for a policy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkv_vllm import compat

if TYPE_CHECKING:
    from gkv_vllm.config import KVPolicyConfig

CONFIG_KEY = "kv_policy"
FLAG_GROUP = "KV cache eviction (gkv_vllm)"
SCHEDULER = "gkv_vllm.engine.scheduler.GKVScheduler"
ASYNC_SCHEDULER = "gkv_vllm.engine.scheduler.GKVAsyncScheduler"
WORKERS = {
    "cpu": "gkv_vllm.worker.cpu_worker.GKVCPUWorker",
    "cuda": "gkv_vllm.worker.gpu_worker.GKVGPUWorker",
}
# The EngineArgs that came from a command line, by id: their errors end the process with a
# sentence. Not a mark on the object, since `vllm bench` passes vars(engine_args) on.
_from_cli: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register() -> None:
    """vLLM calls this in every process; calling it again does nothing."""
    arg_utils = compat.ADD_CLI_ARGS.partition(":")[0]
    if arg_utils not in sys.modules and multiprocessing.parent_process() is not None:
        # An engine core or a worker: its VllmConfig is finished, so spare it the import.
        return
    compat.wrap(compat.ADD_CLI_ARGS, _with_flags)
    compat.wrap(compat.PARSE_ARGS, _with_merged_namespace)
    compat.wrap(compat.FROM_CLI_ARGS, _with_merged_flags)
    compat.wrap(compat.CREATE_ENGINE_CONFIG, _with_activation)


# --- flags ---------------------------------------------------------------------------------------


def flag_name(setting: str) -> str:
    """The flag of a setting: `policy_config` becomes `--kv-policy-config`."""
    return "--kv-" + setting.replace("_", "-")


def _destination(setting: str) -> str:
    return "kv_" + setting


def add_flags(parser: Any) -> None:
    """Add our group. Every default is None, so that a flag that was given can be told apart."""
    from gkv_vllm.config import KVPolicyConfig

    group = parser.add_argument_group(FLAG_GROUP, "Evicts KV blocks of running requests.")
    for setting in dataclasses.fields(KVPolicyConfig):
        default = getattr(KVPolicyConfig(), setting.name)
        note = "" if default is None or default == {} else f" (default: {default})"
        group.add_argument(
            flag_name(setting.name),
            dest=_destination(setting.name),
            default=None,
            type=json_object if setting.metadata["kind"] is Mapping else setting.metadata["kind"],
            choices=setting.metadata["choices"],
            help=setting.metadata["help"].replace("%", "%%") + note,
        )


def json_object(text: str) -> dict[str, Any]:
    """argparse type of --kv-policy-config."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _with_flags(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = add_cli_args(parser, *args, **kwargs)
        add_flags(parser)
        return parser

    return wrapper


def explicit_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings whose flags were given, on the command line or in --config."""
    from gkv_vllm.config import KVPolicyConfig

    values = {
        setting.name: getattr(args, _destination(setting.name), None)
        for setting in dataclasses.fields(KVPolicyConfig)
    }
    return {name: value for name, value in values.items() if value is not None}


def merge(additional_config: Any, flags: Mapping[str, Any]) -> Any:
    """A copy of additional_config in which each flag wins over the same key of `kv_policy`.

    Merging late, once all arguments are read, makes their order irrelevant."""
    from gkv_vllm.config import ConfigError

    if not flags:
        return additional_config
    if not isinstance(additional_config, Mapping | None):
        raise ConfigError("--kv-* flags need an --additional-config that is a JSON object")
    merged = dict(additional_config or {})
    present = merged.get(CONFIG_KEY) or {}
    if isinstance(present, str):
        present = {"policy": present}
    if not isinstance(present, Mapping):
        raise ConfigError(
            f"{CONFIG_KEY} in --additional-config must be a mapping or a policy's name, "
            f"got {present!r}"
        )
    merged[CONFIG_KEY] = {**present, **flags}
    return merged


def merge_into(args: Any) -> None:
    """Put the flags that were given into `args.additional_config`; without one do nothing."""
    flags = explicit_settings(args)
    if flags:
        args.additional_config = merge(getattr(args, "additional_config", None), flags)


def _with_merged_namespace(parse_args: Callable[..., Any]) -> Callable[..., Any]:
    # vLLM hands the parsed arguments to spawned API servers, where plugins load in the middle of
    # from_cli_args: what that process needs must stand in vLLM's own arguments by then.
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        namespace = parse_args(*args, **kwargs)
        with _plain_errors(on_command_line=True):
            merge_into(namespace)
        return namespace

    return wrapper


def _with_merged_flags(from_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(cls: Any, args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        with _plain_errors(on_command_line=True):
            merge_into(args)
            engine_args = from_cli_args(cls, args, *rest, **kwargs)
            if asked_for(engine_args.additional_config):
                read_config(engine_args.additional_config)
                _from_cli[id(engine_args)] = engine_args
            return engine_args

    return wrapper


@contextmanager
def _plain_errors(on_command_line: bool) -> Iterator[None]:
    """On a command line our errors end the process with one sentence each, as argparse does."""
    from gkv_vllm.config import ConfigError
    from gkv_vllm.refusals import PolicyRefused

    try:
        yield
    except (ConfigError, PolicyRefused) as error:
        if not on_command_line:
            raise
        lines = [f"gkv_vllm: error: {line}" for line in str(error).splitlines()]
        raise SystemExit("\n".join(lines)) from None


# --- activation ----------------------------------------------------------------------------------


def asked_for(additional_config: Any) -> bool:
    """Whether `kv_policy` stands in additional_config at all, whatever it says."""
    return isinstance(additional_config, Mapping) and CONFIG_KEY in additional_config


def read_config(additional_config: Any) -> KVPolicyConfig:
    """The validated settings in an additional_config; no policy when it has none."""
    from gkv_vllm.config import ConfigError, KVPolicyConfig

    if not asked_for(additional_config):
        return KVPolicyConfig()
    raw = additional_config[CONFIG_KEY]
    config = KVPolicyConfig.from_mapping(raw)
    if isinstance(raw, Mapping) and raw and "policy" not in raw:
        given = ", ".join(map(str, sorted(raw)))
        raise ConfigError(
            f"kv_policy has settings ({given}) but no policy; add policy (--kv-policy), "
            "or write none to switch eviction off"
        )
    return config


def _with_activation(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not asked_for(self.additional_config):
            return create_engine_config(self, *args, **kwargs)
        with _plain_errors(_from_cli.get(id(self)) is self):
            # Read twice: a bad setting is told before the model's config is looked for.
            read_config(self.additional_config)
            vllm_config = create_engine_config(self, *args, **kwargs)
            activate(vllm_config)
            return vllm_config

    return wrapper


def problems_of(vllm_config: Any, config: KVPolicyConfig) -> list[str]:
    """Everything that keeps this engine from running with this policy, one sentence each."""
    from gkv_vllm import refusals
    from gkv_vllm.config import ConfigError
    from gkv_vllm.policies import registry

    if not config.active:
        return []
    found = refusals.collect(vllm_config, config)
    block_size = vllm_config.cache_config.block_size
    for check in (
        lambda: registry.create(config.policy, config.policy_config),
        lambda: config.check_block_size(block_size),
        lambda: _check_layer_groups(vllm_config, config),
        lambda: _check_pool(vllm_config, config),
        lambda: _check_impl(config),
        lambda: _check_record_folder(config),
    ):
        try:
            check()
        except ConfigError as error:
            found.append(str(error))
    return found


def _check_pool(vllm_config: Any, config: KVPolicyConfig) -> None:
    """Raise when the pool's size is given and cannot hold one request over its budget."""
    from gkv_vllm.config import ConfigError
    from gkv_vllm.engine.footprint import pool_problem

    cache = vllm_config.cache_config
    pool = cache.num_gpu_blocks_override
    # Block 0 is vLLM's null block.
    if pool is None:
        return
    # Layers that keep different blocks take blocks of their own; vLLM may split them further.
    if problem := pool_problem(config, cache.block_size, pool - 1, config.layer_groups):
        raise ConfigError(problem)


def _check_layer_groups(vllm_config: Any, config: KVPolicyConfig) -> None:
    """Raise when vLLM could not give each layer group a KV cache group of its own."""
    from gkv_vllm.config import ConfigError

    if config.layer_groups == 1:
        return
    layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    if config.layer_groups > layers:
        raise ConfigError(
            f"kv_policy layer_groups={config.layer_groups}, but the model has {layers} layers; "
            "lower layer_groups"
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ConfigError(
            f"kv_policy layer_groups={config.layer_groups} takes several KV cache groups, and the "
            "hybrid KV cache manager is off; remove --disable-hybrid-kv-cache-manager or set "
            "layer_groups to 1"
        )


def _check_impl(config: KVPolicyConfig) -> None:
    """Raise when the operators that were asked for are not there."""
    from gkv_vllm.config import ConfigError
    from gkv_vllm.ops import paged

    try:
        paged.resolve(config.impl)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_record_folder(config: KVPolicyConfig) -> None:
    """Raise when no record could be written; the engine makes the folder, if need be."""
    from gkv_vllm.config import ConfigError

    if config.record_positions is None:
        return
    folder = Path(config.record_positions).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"kv_policy record_positions={config.record_positions} is no folder that can be "
            f"written ({there}); name one that can, or leave it out"
        )


def activate(vllm_config: Any) -> None:
    """Make this engine evict: our scheduler and worker, the check of requests, the metrics.

    Does nothing without a policy. Raises ConfigError or PolicyRefused with every problem found."""
    from gkv_vllm.refusals import PolicyRefused

    config = read_config(vllm_config.additional_config)
    if not config.active:
        return
    if problems := problems_of(vllm_config, config):
        raise PolicyRefused("\n".join(problems))

    scheduler_config = vllm_config.scheduler_config
    scheduler_config.scheduler_cls = (
        ASYNC_SCHEDULER if scheduler_config.async_scheduling else SCHEDULER
    )
    vllm_config.parallel_config.worker_cls = WORKERS[vllm_config.device_config.device_type]
    # A new dict: vLLM shares this one with the caller's EngineArgs.
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        CONFIG_KEY: config.to_mapping(),
    }

    from gkv_vllm import metrics, request_check

    request_check.install()
    metrics.install(vllm_config)
