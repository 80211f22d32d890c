# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Every touch on vLLM fits the installed release; one that moved is noticed; wraps are clean."""

import inspect
import re
import sys
import types
from dataclasses import dataclass

import pytest

from gkv_vllm import compat
from gkv_vllm.compat import TOUCHES, Touch, check_touch
from gkv_vllm.worker.runner_v1 import V1Runner
from gkv_vllm.worker.runner_v2 import V2Runner


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.target)
def test_touch_fits_this_vllm(touch):
    assert check_touch(touch) is None


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.target)
def test_touch_has_a_reason_and_an_end(touch):
    assert touch.why and touch.remove_when
    assert touch.target.startswith("vllm.") and touch.target.count(":") == 1


def test_no_target_is_listed_twice():
    targets = [touch.target for touch in TOUCHES]
    assert len(targets) == len(set(targets))


@pytest.fixture
def vendor(monkeypatch):
    """A module to touch: plain, static and class methods, and a dataclass."""
    module = types.ModuleType("vendor_of_test_compat")

    class Thing:
        def plain(self, a, b=1):
            return ("plain", a, b)

        @staticmethod
        def static(a):
            return ("static", a)

        @classmethod
        def cls(cls, a):
            return (cls.__name__, a)

    @dataclass
    class Stats:
        running: int = 0

    module.Thing, module.Stats = Thing, Stats
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def touch(target, *signature):
    return Touch(f"vendor_of_test_compat:{target}", "a reason", "an end", signature)


def test_a_missing_target_is_a_problem(vendor):
    assert "is gone" in check_touch(touch("Thing.other"))
    assert "is gone" in check_touch(touch("Other"))
    assert "is gone" in check_touch(Touch("no_such_module_at_all:A", "w", "r"))


def test_a_moved_signature_is_a_problem(vendor):
    assert check_touch(touch("Thing.plain", "self", "a", "b")) is None
    assert "no longer has c" in check_touch(touch("Thing.plain", "a", "c"))
    assert "no longer has x" in check_touch(touch("Thing.cls", "x"))
    assert check_touch(touch("Stats", "running")) is None
    assert "no longer has waiting" in check_touch(touch("Stats", "waiting"))


def test_an_attribute_that_is_not_set_any_more_is_a_problem():
    """Inherited ones count; methods do not."""
    target = "logging:FileHandler"
    assert check_touch(Touch(target, "w", "r", attributes=("delay", "stream", "lock"))) is None
    problem = check_touch(Touch(target, "w", "r", attributes=("delay", "rows", "emit")))
    assert "no longer sets rows, emit" in problem


@pytest.mark.parametrize(
    ("adapter", "target"),
    [
        (V1Runner, "vllm.v1.worker.gpu_model_runner:GPUModelRunner"),
        (V2Runner, "vllm.v1.worker.gpu.model_runner:GPUModelRunner"),
    ],
    ids=["V1", "V2"],
)
def test_what_an_adapter_reads_of_its_runner_is_listed(adapter, target):
    read = re.findall(r"\b(?:self\.runner|model_runner)\.(\w+)", inspect.getsource(adapter))
    (listed,) = (touch.attributes for touch in TOUCHES if touch.target == target)
    assert read and set(read) <= set(listed)


def counting(calls):
    def around(original):
        def wrapper(*args, **kwargs):
            calls.append(args)
            return original(*args, **kwargs)

        return wrapper

    return around


@pytest.mark.parametrize(
    ("name", "result"),
    [("plain", ("plain", 5, 1)), ("static", ("static", 5)), ("cls", ("Thing", 5))],
)
def test_wrap_keeps_the_kind_the_result_and_the_signature(vendor, name, result):
    target = f"vendor_of_test_compat:Thing.{name}"
    before = inspect.signature(getattr(vendor.Thing, name))
    kind = type(inspect.getattr_static(vendor.Thing, name))
    calls = []
    assert compat.wrap(target, counting(calls))
    assert compat.wrapped(target)
    assert getattr(vendor.Thing(), name)(5) == result
    assert len(calls) == 1
    assert type(inspect.getattr_static(vendor.Thing, name)) is kind
    assert inspect.signature(getattr(vendor.Thing, name)) == before


@pytest.mark.parametrize("name", ["plain", "static", "cls"])
def test_wrapping_twice_wraps_once(vendor, name):
    target = f"vendor_of_test_compat:Thing.{name}"
    calls = []
    assert compat.wrap(target, counting(calls))
    assert not compat.wrap(target, counting(calls))
    getattr(vendor.Thing(), name)(5)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["plain", "static", "cls"])
def test_unwrap_restores_the_original(vendor, name):
    target = f"vendor_of_test_compat:Thing.{name}"
    raw = inspect.getattr_static(vendor.Thing, name)
    original = getattr(raw, "__func__", raw)
    compat.wrap(target, counting([]))
    assert compat.unwrap(target)
    assert not compat.unwrap(target)
    assert not compat.wrapped(target)
    raw = inspect.getattr_static(vendor.Thing, name)
    assert getattr(raw, "__func__", raw) is original


def test_the_check_sees_through_our_own_wrappers():
    """Signatures are those of vLLM's functions, whether we have wrapped them or not."""
    wrapped_now = compat.wrap(compat.CREATE_ENGINE_CONFIG, counting([]))
    try:
        by_target = {t.target: t for t in TOUCHES}
        assert check_touch(by_target[compat.CREATE_ENGINE_CONFIG]) is None
    finally:
        if wrapped_now:
            compat.unwrap(compat.CREATE_ENGINE_CONFIG)
