# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The policy registry: names, lazy import, third-party entry points and errors that teach."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, Literal

import pytest

from gkv_vllm.config import ConfigError
from gkv_vllm.policies import registry
from gkv_vllm.policies.base import Needs, Policy


@dataclass(frozen=True)
class Foreign(Policy):
    """A policy that another package brings."""

    strength: float = 0.5
    loud: bool = False
    tone: Literal["low", "high"] = "low"
    colour: Literal["red", "blue"] | None = None
    limit: int | None = None


NOT_A_POLICY = object()
BUILT_IN = ["gkv", "h2o", "knorm", "random", "recency", "rkv", "snapkv", "streaming_llm"]


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # A module registers when it is first imported, so that has to happen outside of the copy.
    for name in BUILT_IN:
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
    assert registry.names() == BUILT_IN
    for name in BUILT_IN:
        assert issubclass(registry.load(name), Policy)
        assert registry.load(name) is registry.load(name)
        assert registry.create(name, {}) == registry.load(name)()


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
        ("gkv", {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ("gkv", {"temperature": math.nan}, "temperature must be positive and finite, got nan"),
        ("gkv", {"alpha": math.nan}, "alpha must lie between 0 and 1, got nan"),
        ("gkv", {"score_weight": -0.1}, "score_weight must lie between 0 and 1, got -0.1"),
        (
            "gkv",
            {"combine_by": "sum"},
            "parameter 'combine_by' of kv policy 'gkv' must be one of mean, max, rank, got 'sum'",
        ),
        ("gkv", {"variant": None}, "must be one of paper, zipage, spans, got None"),
        ("gkv", {"variant": ["paper"]}, "must be one of paper, zipage, spans, got ['paper']"),
        ("gkv", {"redundancy": "all"}, "must be one of exact, block, superseded, none, got 'all'"),
        ("random", {"seed": 0.5}, "parameter 'seed' of kv policy 'random' must be an int"),
        ("rkv", {"variant": "paper"}, "must be one of original, gkv, got 'paper'"),
        ("rkv", {"kernel": 4}, "kv policy 'rkv': kernel must be a positive odd number of tokens"),
        ("rkv", {"score_weight": 2}, "kv policy 'rkv': score_weight must lie between 0 and 1"),
        ("snapkv", {"kernel": 0}, "kv policy 'snapkv': kernel must be a positive odd number"),
        ("snapkv", {"variant": "max"}, "must be one of original, gkv, kvpress, got 'max'"),
        ("h2o", {"recent_ratio": 1.1}, "kv policy 'h2o': recent_ratio must lie between 0 and 1"),
        ("streaming_llm", {"sinks": -1}, "kv policy 'streaming_llm': sinks must not be negative"),
        ("streaming_llm", {"sinks": True}, "parameter 'sinks' of kv policy 'streaming_llm' must"),
        ("knorm", {"p": 2}, "unknown parameter of kv policy 'knorm' 'p'"),
        ("recency", {"seed": 1}, "unknown parameter of kv policy 'recency' 'seed'"),
        ("foreign", {"loud": 1}, "parameter 'loud' of kv policy 'foreign' must be a bool, got 1"),
        ("foreign", {"tone": "mid"}, "must be one of low, high, got 'mid'"),
        ("foreign", {"limit": "1"}, "parameter 'limit' of kv policy 'foreign' must be an int"),
    ],
)
def test_bad_parameter_is_named(name: str, parameters: dict[str, Any], message: str) -> None:
    registry.register_policy("foreign")(Foreign)
    with pytest.raises(ConfigError) as error:
        registry.create(name, parameters)
    assert message in str(error.value)


def test_parameters_reach_the_policy() -> None:
    policy = registry.create("gkv", {"alpha": 1, "combine_by": "rank", "redundancy": None})
    assert (policy.alpha, policy.combine_by, policy.redundancy) == (1, "rank", None)
    assert registry.create("random", {"seed": 3}).seed == 3


def test_an_optional_parameter_may_be_absent_or_none() -> None:
    registry.register_policy("foreign")(Foreign)
    given = {"tone": "high", "colour": "blue", "limit": 3, "strength": 1}
    assert registry.create("foreign", given) == Foreign(1, tone="high", colour="blue", limit=3)
    assert registry.create("foreign", {"colour": None, "limit": None}) == Foreign()


@pytest.mark.parametrize("parameters", [{"tone": "mid"}, {"colour": "green"}, {"tone": None}])
def test_a_policy_made_in_python_checks_its_choices_too(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        Foreign(**parameters)


def test_a_policy_keeps_one_number_per_token() -> None:
    with pytest.raises(ValueError, match="one number per token: history or attention_mass"):
        Needs(history=True, attention_mass=True)
