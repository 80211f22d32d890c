# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The readable dense form of every score: the oracle of every faster form. Torch, float32.

Shapes carry any number of leading dimensions (layers) before [heads, ...]."""

from __future__ import annotations

import torch
from torch import Tensor

LOCAL_SCORE_FORMS = ("max_probability", "max_logit", "mean_probability")
"""The ways in which sources turn a window of queries into one number per key."""


def local_scores(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    softcap: float = 0.0,
    form: str = "max_probability",
) -> Tensor:
    """How much the window attends to each older token.

    queries [..., query_heads, window, head_dim], keys [..., kv_heads, tokens, head_dim], both in
    logical order, the window being the last `window` tokens. Always the mean over the window of

    - `max_probability`: softmax over all tokens, causal inside the window, then the maximum over
      the query group (G-KV, arXiv 2512.00504, section 3);
    - `max_logit`: the maximum of the logits over the group, then a softmax over the older tokens
      only (the repository of R-KV, arXiv 2505.24133);
    - `mean_probability`: the same softmax as the first, then the mean over the group (kvpress).

    Returns [..., kv_heads, tokens - window] float32."""
    logits = _group_logits(queries, keys, scale, softcap)
    window = queries.shape[-2]
    older = keys.shape[-2] - window
    if form == "max_logit":
        return logits[..., :older].amax(-3).softmax(-1).mean(-2)
    future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    logits[..., older:].masked_fill_(future, float("-inf"))
    attention = logits.softmax(-1)[..., :older]
    if form == "max_probability":
        return attention.amax(-3).mean(-2)
    if form == "mean_probability":
        return attention.mean((-3, -2))
    raise ValueError(f"local_scores: unknown form '{form}'; valid: {', '.join(LOCAL_SCORE_FORMS)}")


def _group_logits(queries: Tensor, keys: Tensor, scale: float, softcap: float) -> Tensor:
    """[..., kv_heads, group, queries, tokens] float32."""
    num_queries, kv_heads, tokens = queries.shape[-2], keys.shape[-3], keys.shape[-2]
    if tokens < num_queries or queries.shape[-3] % kv_heads:
        raise ValueError(f"{tuple(queries.shape)} queries do not fit {tuple(keys.shape)} keys")
    # One product per KV head: the queries of its whole group, over all positions.
    grouped = queries.float().unflatten(-3, (kv_heads, -1)).flatten(-3, -2) * scale
    logits = (grouped @ keys.float().transpose(-1, -2)).unflatten(-2, (-1, num_queries))
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def attention_mass(queries: Tensor, keys: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """The attention that each key gets, summed over these queries and their group.

    queries [..., query_heads, n, head_dim] of the last n of the keys
    [..., kv_heads, tokens, head_dim]. Returns [..., kv_heads, tokens] float32."""
    logits = _group_logits(queries, keys, scale, softcap)
    num_queries, tokens = queries.shape[-2], keys.shape[-2]
    future = torch.ones(num_queries, tokens, dtype=torch.bool, device=keys.device)
    logits.masked_fill_(future.triu(tokens - num_queries + 1), float("-inf"))
    return logits.softmax(-1).sum((-3, -2))


def redundancy(keys: Tensor, threshold: float) -> Tensor:
    """The mean cosine similarity of each key to all keys; near-duplicates excuse the newest.

    R-KV (arXiv 2505.24133), as G-KV uses it: in the matrix of cosines, without its diagonal, each
    column loses its entry in the last row above `threshold`; then the mean of each row.
    keys [..., tokens, head_dim]; returns [..., tokens] float32. O(tokens^2 head_dim)."""
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    cosines = unit @ unit.transpose(-1, -2)
    cosines.diagonal(dim1=-2, dim2=-1).zero_()
    rows = torch.arange(1, keys.shape[-2] + 1, device=keys.device)[:, None]
    last = ((cosines > threshold) * rows).amax(-2, keepdim=True)
    return cosines.masked_fill(rows == last, 0).mean(-1)


def superseded(keys: Tensor) -> Tensor:
    """How much a newer key resembles each: the largest cosine to any that comes after it, 0 if none
    is positive. Ours, after R-KV's `redundancy`, which counts older and newer ones alike.

    keys [..., tokens, head_dim]; returns [..., tokens] float32. O(tokens^2 head_dim)."""
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    return (unit @ unit.transpose(-1, -2)).triu_(1).amax(-1)


def restated(superseded: Tensor, threshold: float) -> Tensor:
    """How surely each token was said again later, together with its neighbours: 0 to 1.

    Ours: how far its cosine to a newer key (`superseded`) lies above `threshold`, on a scale from
    there to 1; of it and the tokens to its left and right the least, so that a passage goes as a
    whole, and a word that only recurs stays. [..., tokens]"""
    least = -max_pool(-superseded, 3)
    return ((least - threshold) / (1 - threshold)).clamp_min(0)


def redundancy_in_block(keys: Tensor, block_size: int, threshold: float) -> Tensor:
    """`redundancy` among the keys of each block alone (Zipage, arXiv 2603.08743).

    Sums are divided by the block size, also in a last block that is not full.
    keys [..., tokens, head_dim]; returns [..., tokens] float32. O(tokens block_size head_dim)."""
    return torch.cat(
        [
            redundancy(block, threshold) * (block.shape[-2] / block_size)
            for block in keys.split(block_size, dim=-2)
        ],
        -1,
    )


def normalise(scores: Tensor) -> Tensor:
    """Divide by the largest score of each layer and head (G-KV's normalisation). [..., tokens]"""
    return scores / scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def block_max(scores: Tensor, block_size: int) -> Tensor:
    """The best token of each block: [..., blocks * block_size] to [..., blocks]."""
    return scores.unflatten(-1, (-1, block_size)).amax(-1)


def check_kernel(kernel: int | None, name: str = "kernel") -> None:
    """ValueError unless it is an odd number of tokens to pool over (or None)."""
    if kernel is not None and (kernel < 1 or kernel % 2 == 0):
        raise ValueError(f"{name} must be a positive odd number of tokens, got {kernel}")


def max_pool(scores: Tensor, kernel: int) -> Tensor:
    """The maximum over each token and its neighbours, `kernel` (odd) in all. [..., tokens]"""
    flat = scores.flatten(0, -2)[:, None]
    return torch.nn.functional.max_pool1d(flat, kernel, 1, kernel // 2).view(scores.shape)


def average_pool(scores: Tensor, kernel: int, padded: bool = True) -> Tensor:
    """The mean over each token and its neighbours, `kernel` (odd) in all. [..., tokens]

    Beyond the ends neighbours are 0 (`padded`), or are not counted."""
    flat = scores.flatten(0, -2)[:, None]
    pooled = torch.nn.functional.avg_pool1d(flat, kernel, 1, kernel // 2, count_include_pad=padded)
    return pooled.view(scores.shape)


def lift(scores: Tensor, span: int, unit: int = 1) -> Tensor:
    """The score of each token, or the mean over the `span` (odd) around it where that is more.

    Ours: a passage of which a part is worth keeping stays whole. Whole blocks (`unit` above 1)
    are passages already, and are left as they are, as is everything by a span of 1. [..., units]"""
    if span == 1 or unit > 1:
        return scores
    return torch.maximum(scores, average_pool(scores, span, padded=False))


def combine(scores: Tensor, by: str) -> Tensor:
    """One number per unit out of those of layers and heads: [..., n, units] to [..., units].

    `mean`, `max`, or `rank`: the mean of the places in each layer's and head's own order."""
    if by == "max":
        return scores.amax(-2)
    if by == "rank":
        places = scores.argsort(dim=-1, stable=True).argsort(-1).float()
        scores = places / max(1, scores.shape[-1] - 1)
    elif by != "mean":
        raise ValueError(f"combine: unknown reduction '{by}'; valid: mean, max, rank")
    return scores.mean(-2)
