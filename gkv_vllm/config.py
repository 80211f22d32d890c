# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The settings, their checks and per-request overrides; nothing here imports torch or vLLM.

Each setting is one dataclass field. Its help text stands in the field's metadata and feeds the
command-line flags, the README table and the error messages.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

NO_POLICY = "none"
REQUEST_KEYS = ("kv_policy", "kv_budget", "kv_protect", "kv_record")
# Keys with our prefix that vLLM itself puts into SamplingParams.extra_args.
VLLM_REQUEST_KEYS = frozenset({"kv_transfer_params", "kv_cache_report_mode"})


class ConfigError(ValueError):
    """A setting that cannot be used; its message is one sentence that says what to write."""


def unknown_key(what: str, key: object, valid: Iterable[str]) -> str:
    """The sentence about an unknown key or name: the nearest valid one first, then all of them."""
    names = sorted(valid)
    near = difflib.get_close_matches(str(key).replace("-", "_"), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {key!r}; {hint}valid: {', '.join(names)}"


def blocks_for(tokens: int, block_size: int) -> int:
    """How many blocks hold this many tokens."""
    return -(-tokens // block_size)


def _setting(
    default: Any,
    help: str,
    *,
    kind: type,
    least: int | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    metadata = {"help": help, "kind": kind, "least": least, "choices": choices}
    if kind is Mapping:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RequestPolicy:
    """What the server's policy means for one request.

    `evict` is False for a request that opted out (`kv_policy: none`): it keeps every block."""

    evict: bool
    budget: int
    protect: str
    record: bool = False
    """Whether each of its evictions is written down."""


@dataclass(frozen=True)
class KVPolicyConfig:
    """The server's eviction settings, validated on construction."""

    policy: str = _setting(
        NO_POLICY, "eviction policy: none (the plugin does nothing) or a registered one", kind=str
    )
    budget: int = _setting(
        2048,
        "tokens kept per request after an eviction, protected ones on top, in whole blocks",
        kind=int,
        least=1,
    )
    interval: int = _setting(
        128,
        "tokens a request may grow over its budget before it is evicted again",
        kind=int,
        least=1,
    )
    window: int = _setting(
        16,
        "observation window: the last queries that score, and the newest tokens never evicted",
        kind=int,
        least=1,
    )
    granularity: str = _setting(
        "token",
        "what is evicted: tokens, whose survivors are moved together (token), or whole blocks, "
        "which nothing moves (block)",
        kind=str,
        choices=("token", "block"),
    )
    scope: str = _setting(
        "head",
        "token granularity: one kept set for each layer and KV head (head), for each layer "
        "(layer), or for all of them (all)",
        kind=str,
        choices=("head", "layer", "all"),
    )
    layer_groups: int = _setting(
        1,
        "block granularity: into how many groups the layers are split, each of which keeps blocks "
        "of its own",
        kind=int,
        least=1,
    )
    layer_split: str = _setting(
        "contiguous",
        "how layers are split into layer_groups: neighbours together (contiguous) or dealt out in "
        "turn (interleaved)",
        kind=str,
        choices=("contiguous", "interleaved"),
    )
    protect: str = _setting(
        "prompt",
        "what is never evicted: the whole prompt, the first block (sinks) or nothing (none)",
        kind=str,
        choices=("prompt", "sinks", "none"),
    )
    trigger: str = _setting(
        "interval",
        "when to evict: whenever a request is over budget + interval",
        kind=str,
        choices=("interval",),
    )
    min_budget: int | None = _setting(
        None,
        "smallest kv_budget a request may ask for (default: a quarter of the budget, and room for "
        "the window and one block)",
        kind=int,
        least=1,
    )
    max_budget: int | None = _setting(
        None, "largest kv_budget a request may ask for (default: no bound)", kind=int, least=1
    )
    reserve_prompt: int | None = _setting(
        None,
        "prompt tokens that the start-up capacity check assumes per request; longer prompts are "
        "protected whole all the same (default: the budget)",
        kind=int,
        least=0,
    )
    impl: str = _setting(
        "auto",
        "what scores and moves tokens: C++ on CPUs (cpu), on GPUs Triton kernels (triton) or CUDA "
        "C++ where there is any (cuda), the readable torch form (reference), the fastest (auto)",
        kind=str,
        choices=("auto", "reference", "cpu", "triton", "cuda"),
    )
    record_positions: str | None = _setting(
        None,
        "folder for records of what was evicted, one file for each request that asks with "
        "kv_record=1 (default: nothing is recorded)",
        kind=str,
    )
    policy_config: Mapping[str, Any] = _setting(
        None, "the policy's own parameters, as a JSON object", kind=Mapping
    )

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            _check_value(setting.name, getattr(self, setting.name), setting)
        object.__setattr__(self, "policy_config", copy.deepcopy(dict(self.policy_config)))
        self._check_together()

    def _check_together(self) -> None:
        if self.window > self.budget:
            raise ConfigError(
                f"kv_policy window={self.window} is larger than budget={self.budget}; the budget "
                "holds the window, so raise the budget or lower the window"
            )
        if self.min_budget is not None and self.min_budget > self.budget:
            raise ConfigError(
                f"kv_policy min_budget={self.min_budget} is larger than budget={self.budget}; "
                "lower min_budget or raise budget"
            )
        if self.max_budget is not None and self.max_budget < self.budget:
            raise ConfigError(
                f"kv_policy max_budget={self.max_budget} is smaller than budget={self.budget}; "
                "raise max_budget or lower budget"
            )
        if self.layer_groups > 1 and self.granularity == "token":
            raise ConfigError(
                f"kv_policy layer_groups={self.layer_groups} is for block granularity: with "
                "granularity=token every layer and KV head keeps tokens of its own already; drop "
                "layer_groups or set granularity to block"
            )

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any] | str | None) -> KVPolicyConfig:
        """Parse what stands under `kv_policy`: a mapping, a policy's name alone, or nothing."""
        if raw is None:
            return cls()
        if isinstance(raw, str):
            raw = {"policy": raw}
        if not isinstance(raw, Mapping):
            raise ConfigError(
                f"kv_policy must be a mapping of settings or a policy's name, got {_shown(raw)}"
            )
        valid = [setting.name for setting in dataclasses.fields(cls)]
        for key in raw:
            if key not in valid:
                raise ConfigError(unknown_key("kv_policy key", key, valid))
        return cls(**raw)

    def to_mapping(self) -> dict[str, Any]:
        """The same settings as plain JSON values; `from_mapping` gives an equal config back."""
        return dataclasses.asdict(self)

    @property
    def active(self) -> bool:
        """Whether a policy was asked for at all."""
        return self.policy != NO_POLICY

    @property
    def moves_tokens(self) -> bool:
        """Whether eviction picks tokens, and survivors move, rather than whole blocks."""
        return self.granularity == "token"

    @property
    def reserved_prompt(self) -> int:
        """Prompt tokens that start-up sizing assumes per request."""
        return self.budget if self.reserve_prompt is None else self.reserve_prompt

    def smallest_budget(self, block_size: int = 1) -> int:
        """The smallest `kv_budget` a request may ask for, given the block size."""
        if self.min_budget is not None:
            return self.min_budget
        return min(self.budget, max(self.budget // 4, self._floor(block_size)))

    def _floor(self, block_size: int) -> int:
        """The smallest budget that holds the window and one more block."""
        return blocks_for(self.window, block_size) * block_size + 1

    def check_block_size(self, block_size: int) -> None:
        """Raise unless every budget that can be asked for holds the window and one more block."""
        floor = self._floor(block_size)
        for name, value in (("budget", self.budget), ("min_budget", self.min_budget)):
            if value is not None and value < floor:
                raise ConfigError(
                    f"kv_policy {name}={value} fits in {blocks_for(value, block_size)} block(s) of "
                    f"{block_size} tokens, but window={self.window} and one more block need "
                    f"{blocks_for(floor, block_size)}; raise {name} to at least {floor} or lower "
                    "the block size"
                )

    def for_request(
        self, extra_args: Mapping[str, Any] | None, block_size: int = 1
    ) -> RequestPolicy:
        """Apply a request's `kv_*` arguments to the server's settings.

        Keys without our prefix belong to others and are ignored."""
        extra_args = extra_args or {}
        for key in extra_args:
            if str(key).startswith("kv_") and key not in VLLM_REQUEST_KEYS | set(REQUEST_KEYS):
                raise ConfigError(unknown_key("request argument", key, REQUEST_KEYS))
        return RequestPolicy(
            evict=self._request_evicts(extra_args.get("kv_policy", self.policy)),
            budget=self._request_budget(extra_args.get("kv_budget", self.budget), block_size),
            protect=self._request_protect(extra_args.get("kv_protect", self.protect)),
            record=self._request_records(extra_args.get("kv_record", 0)),
        )

    def _request_evicts(self, asked: Any) -> bool:
        if asked not in (NO_POLICY, self.policy):
            raise ConfigError(
                f"kv_policy must be {NO_POLICY!r} or this server's policy {self.policy!r}, "
                f"got {_shown(asked)}"
            )
        return asked != NO_POLICY

    def _request_budget(self, asked: Any, block_size: int) -> int:
        _check_int("kv_budget", asked)
        least = self.smallest_budget(block_size)
        if asked < least:
            raise ConfigError(
                f"kv_budget={asked} is below this server's smallest budget of {least} tokens"
            )
        if self.max_budget is not None and asked > self.max_budget:
            raise ConfigError(
                f"kv_budget={asked} is above this server's largest budget of "
                f"{self.max_budget} tokens"
            )
        return asked

    def _request_protect(self, asked: Any) -> str:
        _check_choice("kv_protect", asked, setting_named("protect").metadata["choices"])
        return asked

    def _request_records(self, asked: Any) -> bool:
        if not isinstance(asked, int) or asked not in (0, 1):
            raise ConfigError(f"kv_record must be 1 or 0, got {_shown(asked)}")
        if asked and self.record_positions is None:
            raise ConfigError(
                "kv_record=1, but this server records nothing; start it with "
                "--kv-record-positions DIR, or leave kv_record out"
            )
        return bool(asked)


def setting_named(name: str) -> dataclasses.Field[Any]:
    """The dataclass field of one setting, with its help, kind and choices as metadata."""
    return KVPolicyConfig.__dataclass_fields__[name]


def _shown(value: object) -> str:
    return f"{value!r} of type {type(value).__name__}"


def _check_int(name: str, value: object) -> None:
    # bool is an int to Python, but `budget: true` is a mistake.
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number, got {_shown(value)}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {_shown(value)}")


def _check_value(key: str, value: object, setting: dataclasses.Field[Any]) -> None:
    """Check one setting alone against its field: type, smallest value, choices."""
    name, rule = f"kv_policy {key}", setting.metadata
    if value is None and setting.default is None:
        return
    if rule["choices"]:
        _check_choice(name, value, rule["choices"])
    elif rule["kind"] is int:
        _check_int(name, value)
        if value < rule["least"]:  # type: ignore[operator]
            raise ConfigError(f"{name}={value} must be at least {rule['least']}")
    elif rule["kind"] is str:
        if not isinstance(value, str) or not value:
            what = "a folder" if key == "record_positions" else "a name"
            raise ConfigError(f"{name} must be {what}, got {_shown(value)}")
    elif not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a JSON object, got {_shown(value)}")
