# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Puts data, script and style into one HTML file that needs nothing else and reaches nowhere."""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from importlib.resources import files
from typing import Any

import numpy as np


def pack(array: np.ndarray) -> dict[str, Any]:
    """An array as JSON: `unpack` in common.js, and here, makes it an array again."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "data": base64.b64encode(zlib.compress(little.tobytes())).decode(),
    }


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """The array that `pack` was given."""
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    return np.frombuffer(raw, np.dtype(packed["dtype"]).newbyteorder("<")).reshape(packed["shape"])


def page(kind: str, title: str, data: dict[str, Any]) -> str:
    """The page of a kind, `keepmap` or `forgot`, about this data."""
    # A "<" in a text must not end the script element that the data stands in.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "TITLE": html.escape(title),
        "STYLE": _asset("style.css"),
        "BODY": _asset(f"{kind}.html"),
        "SCRIPT": _asset("common.js") + _asset(f"{kind}.js"),
        "DATA": text,
    }
    # In one pass: what looks like a place inside of what is put in is left as it is.
    return re.sub(r"@(\w+)@", lambda place: parts[place[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return (files("gkv_vllm.view") / "assets" / name).read_text(encoding="utf-8")
