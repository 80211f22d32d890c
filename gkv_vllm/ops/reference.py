# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The readable torch form of every score operation: the oracle of every faster form.

Shapes carry any number of leading dimensions (layers) before [heads, ...]."""

from __future__ import annotations

import torch
from torch import Tensor


def local_scores(queries: Tensor, keys: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """How much the window attends to each older token (G-KV, arXiv 2512.00504, section 3).

    queries [..., query_heads, window, head_dim], keys [..., kv_heads, tokens, head_dim], both in
    logical order, the window being the last `window` tokens. Softmax in float32 over all tokens,
    causal inside the window; maximum over the query group, mean over the window.
    Returns [..., kv_heads, tokens - window] float32."""
    window = queries.shape[-2]
    kv_heads, tokens = keys.shape[-3], keys.shape[-2]
    if tokens < window or queries.shape[-3] % kv_heads:
        raise ValueError(
            f"local_scores: {tuple(queries.shape)} queries do not fit {tuple(keys.shape)} keys"
        )
    # One product per KV head: the queries of its whole group, over all window positions.
    grouped = queries.float().unflatten(-3, (kv_heads, -1)).flatten(-3, -2) * scale
    logits = (grouped @ keys.float().transpose(-1, -2)).unflatten(-2, (-1, window))
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    logits[..., tokens - window :].masked_fill_(future, float("-inf"))
    attention = logits.softmax(-1)[..., : tokens - window]
    return attention.amax(-3).mean(-2)


def normalise(scores: Tensor) -> Tensor:
    """Divide by the largest score of each layer and head (G-KV's normalisation). [..., tokens]"""
    return scores / scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def block_max(scores: Tensor, block_size: int, num_blocks: int) -> Tensor:
    """The best token of each block, [..., tokens] to [..., num_blocks]; 0 where none is."""
    missing = num_blocks * block_size - scores.shape[-1]
    padded = torch.nn.functional.pad(scores, (0, missing))
    return padded.unflatten(-1, (num_blocks, block_size)).amax(-1)


def decayed_max(history: Tensor, present: Tensor, alpha: float) -> Tensor:
    """G-KV's global score: max(alpha * past, present), elementwise."""
    return torch.maximum(alpha * history, present)


def combine(scores: Tensor, by: str) -> Tensor:
    """One number per block, [blocks], out of [layers, kv_heads, blocks]."""
    flat = scores.flatten(0, -2)
    if by == "max":
        return flat.amax(0)
    if by == "rank":
        flat = flat.argsort(dim=-1, stable=True).argsort(-1).float() / max(1, flat.shape[-1] - 1)
    elif by != "mean":
        raise ValueError(f"combine: unknown reduction '{by}'; valid: mean, max, rank")
    return flat.mean(0)
