# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The policy registry: names, lazy import, third-party entry points and errors that teach."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from gkv_vllm.config import ConfigError
from gkv_vllm.policies import registry
from gkv_vllm.policies.base import Policy


@dataclass(frozen=True)
class Foreign(Policy):
    """A policy that another package brings."""

    strength: float = 0.5
    loud: bool = False


NOT_A_POLICY = object()


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # A module registers when it is first imported, so that has to happen outside of the copy.
    for name in ("gkv", "random", "recency"):
        registry.load(name)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Third-party entry points by name; `load` returns what stands here."""
    objects: dict[str, Any] = {}

    class Point(EntryPoint):
        def load(self) -> Any:
            return objects[self.name]

    def find(group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == registry.ENTRY_POINT_GROUP
        return [Point(key, "x:y", group) for key in objects if name in (None, key)]

    monkeypatch.setattr(registry, "entry_points", find)
    return objects


def test_built_in_policies_are_named_and_load() -> None:
    assert {"gkv", "random", "recency"} <= set(registry.names())
    for name in ("gkv", "random", "recency"):
        assert issubclass(registry.load(name), Policy)
        assert registry.load(name) is registry.load(name)


def test_names_are_sorted_and_unique(entry_points: dict[str, Any]) -> None:
    entry_points.update(foreign=Foreign, gkv=Foreign)
    names = registry.names()
    assert names == sorted(set(names))
    assert "foreign" in names


def test_registry_imports_no_policy_that_was_not_asked_for() -> None:
    code = (
        "import sys; from gkv_vllm.policies import registry; registry.names();"
        "registry.load('recency');"
        "print(*(m for m in ('torch', 'vllm', 'gkv_vllm.policies.gkv', 'gkv_vllm.policies.random',"
        " 'gkv_vllm.policies.recency') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["gkv_vllm.policies.recency"]


def test_unknown_policy_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown kv policy 'recensy'; did you mean 'recency'"):
        registry.load("recensy")


def test_third_party_policy_loads_from_its_entry_point(entry_points: dict[str, Any]) -> None:
    entry_points["foreign"] = Foreign
    assert registry.create("foreign", {"strength": 2}) == Foreign(strength=2)


def test_built_in_policy_wins_over_an_entry_point(entry_points: dict[str, Any]) -> None:
    entry_points["recency"] = Foreign
    assert registry.load("recency").__name__ == "Recency"


@pytest.mark.parametrize("thing", [NOT_A_POLICY, dict, Policy()])
def test_entry_point_that_is_no_policy_is_refused(entry_points: dict[str, Any], thing: Any) -> None:
    entry_points["foreign"] = thing
    with pytest.raises(ConfigError, match="'foreign' comes from an entry point that is not"):
        registry.load("foreign")


@pytest.mark.parametrize("name", ["none", "recency"])
def test_taken_name_cannot_be_registered(name: str) -> None:
    registry.load("recency")
    with pytest.raises(ValueError, match=f"'{name}' is taken"):
        registry.register_policy(name)(Foreign)


def test_registering_the_same_class_again_is_harmless() -> None:
    assert registry.register_policy("foreign")(Foreign) is Foreign
    assert registry.register_policy("foreign")(Foreign) is Foreign
    assert registry.load("foreign") is Foreign


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("gkv", {"alfa": 1.0}, "unknown parameter of kv policy 'gkv' 'alfa'; did you mean 'alpha'"),
        ("gkv", {"alpha": "1"}, "parameter 'alpha' of kv policy 'gkv' must be a float, got '1'"),
        ("gkv", {"alpha": True}, "must be a float, got True"),
        ("gkv", {"alpha": 1.5}, "kv policy 'gkv': alpha must lie between 0 and 1, got 1.5"),
        ("gkv", {"combine_by": "sum"}, "combine_by must be mean, max or rank, got 'sum'"),
        ("random", {"seed": 0.5}, "parameter 'seed' of kv policy 'random' must be a int"),
        ("recency", {"seed": 1}, "unknown parameter of kv policy 'recency' 'seed'"),
        ("foreign", {"loud": 1}, "parameter 'loud' of kv policy 'foreign' must be a bool, got 1"),
    ],
)
def test_bad_parameter_is_named(name: str, parameters: dict[str, Any], message: str) -> None:
    registry.register_policy("foreign")(Foreign)
    with pytest.raises(ConfigError) as error:
        registry.create(name, parameters)
    assert message in str(error.value)


def test_parameters_reach_the_policy() -> None:
    policy = registry.create("gkv", {"alpha": 1, "combine_by": "rank"})
    assert (policy.alpha, policy.combine_by) == (1, "rank")
    assert registry.create("random", {"seed": 3}).seed == 3
