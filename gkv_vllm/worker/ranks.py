# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What tensor-parallel ranks must agree on: scores that heads of several ranks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The ranks that hold the heads of one layer. Without a group there is only this one."""

    def __init__(self, group: dist.ProcessGroup | None = None, kv_heads: int | None = None) -> None:
        """kv_heads: how many the model has; where there are more ranks, some have the same."""
        self.group = group
        self.kv_heads = kv_heads
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0

    @property
    def first_head(self) -> int:
        """Which of the model's KV heads is the first of this rank."""
        return self.rank * (self.kv_heads or 0) // self.size

    def agree(self, scores: Sequence[Tensor], by: Literal["mean", "max"]) -> list[Tensor]:
        """These scores over all ranks, `mean` or `max`: one all-reduce for all of them.

        Every rank brings the same shapes, since all carry out the same plan; and every rank gets
        the same bits, so that each can choose the same tokens for itself."""
        if self.size == 1 or not scores:
            return list(scores)
        flat = torch.cat([x.flatten() for x in scores])
        dist.all_reduce(
            flat, dist.ReduceOp.MAX if by == "max" else dist.ReduceOp.SUM, group=self.group
        )
        if by == "mean":
            flat /= self.size
        parts = flat.split([x.numel() for x in scores])
        return [part.view_as(x) for part, x in zip(parts, scores, strict=True)]
