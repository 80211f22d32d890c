# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Finds policies by name without importing those that are not asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_type_hints

from gkv_vllm.config import ConfigError, unknown_key
from gkv_vllm.policies.base import Policy

ENTRY_POINT_GROUP = "gkv_vllm.policies"
"""Third parties add policies here: `my_policy = "my_package.module:MyPolicy"`."""

_BUILT_IN = {
    "gkv": "gkv_vllm.policies.gkv",
    "recency": "gkv_vllm.policies.recency",
    "random": "gkv_vllm.policies.random",
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
        wanted = hints[key]
        accepted = (int, float) if wanted is float else wanted
        if isinstance(value, bool) is not (wanted is bool) or not isinstance(value, accepted):
            raise ConfigError(
                f"parameter '{key}' of kv policy '{name}' must be a {wanted.__name__}, "
                f"got {value!r}"
            )
    try:
        return cls(**parameters)
    except ValueError as error:
        raise ConfigError(f"kv policy '{name}': {error}") from error


def _checked(name: str, cls: Any) -> type[Policy]:
    if not (isinstance(cls, type) and issubclass(cls, Policy) and dataclasses.is_dataclass(cls)):
        raise ConfigError(
            f"kv policy '{name}' comes from an entry point that is not a Policy dataclass"
        )
    return cls
