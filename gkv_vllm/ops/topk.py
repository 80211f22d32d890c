# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Which units stay, out of their scores."""

from __future__ import annotations

from torch import Tensor


def topk_keep(scores: Tensor, count: int) -> Tensor:
    """The `count` best units of each row in ascending order; of equals the newer ones.

    scores [..., units] without NaN; returns [..., count] int64. A selection, not a sort: the
    smallest score that stays is a threshold, and what ties with it fills up from the newest."""
    units = scores.shape[-1]
    if not 0 <= count <= units:
        raise ValueError(f"topk_keep: cannot keep {count} of {units} units")
    if not count:
        return scores.new_empty((*scores.shape[:-1], 0)).long()
    threshold = scores.kthvalue(units - count + 1, keepdim=True).values
    above, equal = scores > threshold, scores == threshold
    newer_equals = equal.flip(-1).cumsum(-1).flip(-1)
    stays = above | (equal & (newer_equals <= count - above.sum(-1, keepdim=True)))
    return stays.nonzero()[:, -1].unflatten(0, (*scores.shape[:-1], count))
