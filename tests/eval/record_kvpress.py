# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Writes kvpress.json: what kvpress's presses score and keep of analytic keys and queries.

A script for an environment with kvpress, once for each version of it; nothing of ours is imported.
The attention module is a stand-in whose query projection is the identity, without rotation: the
hidden states are the queries."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from kvpress import KnormPress, SnapKVPress, StreamingLLMPress
from torch import Tensor

QUERY_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
CASES: dict[str, dict[str, Any]] = {
    "streaming_llm": {"press": StreamingLLMPress, "settings": {"n_sink": 4}, "window": 0},
    "knorm": {"press": KnormPress, "settings": {}, "window": 0},
    "snapkv": {"press": SnapKVPress, "settings": {"window_size": 8}, "window": 8},
}
OLDER, KEPT_OF_THEM = 64, 32
"""Tokens before the window, and how many of them stay."""


def analytic(heads: int, tokens: int, speed: float, amplitude: float) -> Tensor:
    """X[h, t, c] = a (1 + (t mod 7) / 10) sin(0.7 (h + 1) + 0.13 s (t + 1) (c + 1) + 0.31 s t)."""
    h = torch.arange(heads, dtype=torch.float64)[:, None, None]
    t = torch.arange(tokens, dtype=torch.float64)[:, None]
    c = torch.arange(HEAD_DIM, dtype=torch.float64)
    phase = 0.7 * (h + 1) + 0.13 * speed * (t + 1) * (c + 1) + 0.31 * speed * t
    return (amplitude * (1 + 0.1 * (t % 7)) * torch.sin(phase)).float()


def record(case: dict[str, Any]) -> dict[str, Any]:
    tokens = OLDER + case["window"]
    keys = analytic(KV_HEADS, tokens, 1.1, 1.0)[None]
    queries = analytic(QUERY_HEADS, tokens, 1.7, 1.0)[None]
    module = SimpleNamespace(
        q_proj=torch.nn.Identity(),
        head_dim=HEAD_DIM,
        config=SimpleNamespace(num_attention_heads=QUERY_HEADS, num_key_value_heads=KV_HEADS),
    )
    turn = torch.ones(1, tokens, HEAD_DIM), torch.zeros(1, tokens, HEAD_DIM)
    press = case["press"](
        compression_ratio=1 - (KEPT_OF_THEM + case["window"] + 0.5) / tokens, **case["settings"]
    )
    hidden = queries.transpose(1, 2).flatten(2)
    given = (module, hidden, keys, keys, None, {"position_embeddings": turn})
    places = torch.arange(tokens)[:, None].expand_as(keys)
    _, kept = press.compress(module, hidden, keys, places, *given[4:])
    return {
        "window": case["window"],
        "scores": [[float(f"{x:.9g}") for x in head] for head in press.score(*given)[0].tolist()],
        "kept": kept[0, :, :, 0].sort().values.tolist(),
    }


def main() -> None:
    found = {name: record(case) for name, case in CASES.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(case)}" for name, case in found.items()]
    lines.insert(0, f'"kvpress": {json.dumps(version("kvpress"))}')
    Path(__file__).with_name("kvpress.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
