# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Finds policies by name without importing those that are not asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_args, get_type_hints

from gkv_vllm.config import ConfigError, unknown_key
from gkv_vllm.policies.base import Policy, is_choice, literal_choices

ENTRY_POINT_GROUP = "gkv_vllm.policies"
"""Third parties add policies here: `my_policy = "my_package.module:MyPolicy"`."""

_BUILT_IN = {
    "gkv": "gkv_vllm.policies.gkv",
    "h2o": "gkv_vllm.policies.h2o",
    "knorm": "gkv_vllm.policies.knorm",
    "random": "gkv_vllm.policies.random",
    "recency": "gkv_vllm.policies.recency",
    "rkv": "gkv_vllm.policies.rkv",
    "snapkv": "gkv_vllm.policies.snapkv",
    "streaming_llm": "gkv_vllm.policies.streaming_llm",
}
_registered: dict[str, type[Policy]] = {}

P = TypeVar("P", bound=type[Policy])


def register_policy(name: str) -> Callable[[P], P]:
    """Class decorator: make a policy known under `name` (`none` is taken)."""

    def decorate(cls: P) -> P:
        if name == "none" or _registered.get(name, cls).__qualname__ != cls.__qualname__:
            raise ValueError(f"the policy name '{name}' is taken")
        _registered[name] = cls
        return cls

    return decorate


def built_in() -> list[str]:
    """The names of the policies that this package brings, sorted."""
    return sorted(_BUILT_IN)


def names() -> list[str]:
    """All names that `load` knows, sorted."""
    third_party = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
    return sorted({*_BUILT_IN, *_registered, *third_party})


def load(name: str) -> type[Policy]:
    """The class behind a name; ConfigError names the nearest one that exists."""
    if name not in _registered and name in _BUILT_IN:
        import_module(_BUILT_IN[name])
    if name not in _registered:
        for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
            _registered[name] = _checked(name, point.load())
    if name not in _registered:
        raise ConfigError(unknown_key("kv policy", name, ["none", *names()]))
    return _registered[name]


def create(name: str, parameters: Mapping[str, Any]) -> Policy:
    """A policy with its own parameters; ConfigError says which parameter is wrong and how."""
    cls = load(name)
    fields = {f.name for f in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for key, value in parameters.items():
        if key not in fields:
            raise ConfigError(unknown_key(f"parameter of kv policy '{name}'", key, fields))
        if not _accepts(hints[key], value):
            raise ConfigError(
                f"parameter '{key}' of kv policy '{name}' must be {_expected(hints[key])}, "
                f"got {value!r}"
            )
    try:
        return cls(**parameters)
    except ValueError as error:
        raise ConfigError(f"kv policy '{name}': {error}") from error


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a value from JSON has the type of a policy's field."""
    if literal_choices(hint):
        return is_choice(hint, value)
    for wanted in get_args(hint) or (hint,):
        accepted = (int, float) if wanted is float else wanted
        if isinstance(value, accepted) and isinstance(value, bool) is (wanted is bool):
            return True
    return False


def _expected(hint: Any) -> str:
    if choices := literal_choices(hint):
        return "one of " + ", ".join(choices)
    plain = next(part for part in get_args(hint) or (hint,) if part is not type(None))
    return f"{'an' if plain is int else 'a'} {plain.__name__}"


def _checked(name: str, cls: Any) -> type[Policy]:
    if not (isinstance(cls, type) and issubclass(cls, Policy) and dataclasses.is_dataclass(cls)):
        raise ConfigError(
            f"kv policy '{name}' comes from an entry point that is not a Policy dataclass"
        )
    return cls
