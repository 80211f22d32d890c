# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""How a touch on vLLM's internals is checked or wrapped; no behaviour of ours.

The list of them is in `touches.py`. What the wrappers do stands with their owners (`plugin.py`,
`metrics.py`)."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from gkv_vllm.touches import (
    ADD_CLI_ARGS,
    CREATE_ENGINE_CONFIG,
    FROM_CLI_ARGS,
    GENERATE,
    MANAGER_INIT,
    PARSE_ARGS,
    PROCESS_INPUTS,
    RECORD,
    RESPONSES,
    SUPPORTED_VLLM,
    TOUCHES,
    Touch,
)

__all__ = [
    "ADD_CLI_ARGS",
    "CREATE_ENGINE_CONFIG",
    "FROM_CLI_ARGS",
    "GENERATE",
    "MANAGER_INIT",
    "PARSE_ARGS",
    "PROCESS_INPUTS",
    "RECORD",
    "RESPONSES",
    "SUPPORTED_VLLM",
    "TOUCHES",
    "Touch",
    "check_touch",
    "unwrap",
    "wrap",
    "wrapped",
]

# Set on an installed wrapper, so that a second install is recognised.
_MARK = "__gkv_wrapper__"


def resolve(target: str) -> tuple[Any, str, Any]:
    """The owner, last name and raw attribute (descriptors unopened) that "module:A.b" points at."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    return owner, name, inspect.getattr_static(owner, name)


def check_touch(touch: Touch) -> str | None:
    """A sentence about what no longer fits, or None. Imports the target's module."""
    try:
        owner, name, _ = resolve(touch.target)
    except (ImportError, AttributeError) as error:
        return f"{touch.target} is gone ({error}); needed because: {touch.why}"
    target = getattr(owner, name)
    present = _names(target) if touch.signature else []
    missing = [parameter for parameter in touch.signature if parameter not in present]
    if missing:
        return (
            f"{touch.target} no longer has {', '.join(missing)} (it has {', '.join(present)}); "
            f"needed because: {touch.why}"
        )
    missing = [attribute for attribute in touch.attributes if not _sets(target, attribute)]
    if missing:
        return f"{touch.target} no longer sets {', '.join(missing)}; needed because: {touch.why}"
    return None


def _names(target: Any) -> list[str]:
    if inspect.isclass(target):
        return list(getattr(target, "__dataclass_fields__", {}))
    return list(inspect.signature(target).parameters)


def _sets(target: type, attribute: str) -> bool:
    """Whether this class, or one that it extends, gives its instances the attribute."""
    return any(attribute in _assigned(of) for of in target.__mro__ if of is not object)


@functools.cache
def _assigned(of: type) -> frozenset[str]:
    """What the methods of a class assign to on `self`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(of)))
    except (OSError, TypeError):  # not written in Python
        return frozenset()
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def wrap(target: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    """Replace the function at `target` by `around(function)`, once per process.

    Keeps the kind of method (static, class, plain) and `__wrapped__`. Returns False when our
    wrapper is already there, which makes installing twice harmless."""
    owner, name, raw = resolve(target)
    kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
    original = raw.__func__ if kind else raw
    if getattr(original, _MARK, False):
        return False
    wrapper = functools.wraps(original)(around(original))
    setattr(wrapper, _MARK, True)
    setattr(owner, name, kind(wrapper) if kind else wrapper)
    return True


def unwrap(target: str) -> bool:
    """Undo `wrap`; False when nothing of ours is there. Used by tests and by the doctor."""
    owner, name, raw = resolve(target)
    kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
    wrapper = raw.__func__ if kind else raw
    if not getattr(wrapper, _MARK, False):
        return False
    setattr(owner, name, kind(wrapper.__wrapped__) if kind else wrapper.__wrapped__)
    return True


def wrapped(target: str) -> bool:
    """Whether our wrapper is installed at `target`."""
    raw = resolve(target)[2]
    return bool(getattr(getattr(raw, "__func__", raw), _MARK, False))
