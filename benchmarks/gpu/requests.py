# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Requests that decode: their lengths, block tables and holes, on the host and on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from gpu.common import Model
from gpu.pool import Batch, Pool
from torch import Tensor

from gkv_vllm.ops.upload import upload


@dataclass
class Request:
    """One request on the host: how long it is, and where its live tokens lie."""

    tokens: int
    live: list[int]
    """Its blocks in logical order, those of tokens to come included."""
    columns: list[int] = field(default_factory=list)
    """Where each of these blocks stands in the request's row of the block table."""
    lost: int = 0
    """Tokens."""

    def __post_init__(self) -> None:
        self.columns = list(range(len(self.live)))

    @property
    def live_tokens(self) -> int:
        return self.tokens - self.lost

    def drop(self, first: int, count: int, block_size: int) -> list[int]:
        """Lose `count` live blocks from the `first` on, and take them again for tokens to come.

        Returns the columns of the table that they leave."""
        gone, holes = self.live[first : first + count], self.columns[first : first + count]
        del self.live[first : first + count], self.columns[first : first + count]
        behind = self.columns[-1] + 1
        self.live += gone
        self.columns += range(behind, behind + count)
        self.lost += count * block_size
        return holes


class Requests:
    """A batch that decodes: each grows by a token a step, and falls due every `interval` steps.

    Their lengths are staggered, so that about as many are due in each step. When due, a request
    goes back to `budget` live tokens: by eviction, or without it just so, so that attention has the
    same work in all modes."""

    def __init__(self, pool: Pool, count: int, budget: int, steps: int) -> None:
        """steps: the most that will be made."""
        self.pool, self.budget, model = pool, budget, pool.model
        self.model, self.longest = model, budget + model.interval
        self.blocks = self.blocks_each(model, budget)
        rounds = math.ceil(steps / model.interval) + 1
        width = self.blocks + rounds * model.interval // model.block_size
        order = pool.order[: count * self.blocks].view(count, self.blocks).tolist()
        self.all = [
            Request(budget + i * model.interval // count, blocks) for i, blocks in enumerate(order)
        ]
        self.rows = np.zeros((count, width), dtype=np.int32)
        self.rows[:, : self.blocks] = order
        self.table = torch.from_numpy(self.rows).to(pool.device, copy=True)
        self.lens = torch.tensor([r.tokens for r in self.all], dtype=torch.int32).to(pool.device)

    @staticmethod
    def blocks_each(model: Model, budget: int) -> int:
        return math.ceil((budget + model.interval) / model.block_size)

    def due(self) -> list[int]:
        return [i for i, r in enumerate(self.all) if r.live_tokens >= self.longest]

    def recorded(self) -> list[int]:
        """The ring slot of each row in the coming step: its own within a window of falling due."""
        first = self.longest - self.model.window
        return [i if r.live_tokens >= first else -1 for i, r in enumerate(self.all)]

    def grow(self) -> None:
        """A token each; the device's lengths first, without a wait."""
        self.lens.add_(1)
        for request in self.all:
            request.tokens += 1

    def shorten(self, due: list[int]) -> None:
        """Without eviction: forget the newest tokens, and write over them."""
        self.lens[upload(due, self.pool.device)] -= self.model.interval
        for i in due:
            self.all[i].tokens -= self.model.interval

    def batch(self, due: list[int], window_queries: Tensor) -> Batch:
        """What is scored: the due requests, of equal length, with their live blocks."""
        ids = [block for i in due for block in self.all[i].live]
        tables = upload(ids, self.pool.device, torch.int32).view(len(due), -1)
        return Batch(self.pool, len(due), self.longest, tables, window_queries)

    def lose(self, due: list[int], batch: Batch) -> None:
        """After the survivors have moved: null what was left, and use these blocks again."""
        size = self.model.block_size
        first = self.model.protected // size + batch.keep_blocks
        count = batch.candidate_blocks - batch.keep_blocks
        for i in due:
            request = self.all[i]
            holes = request.drop(first, count, size)
            self.rows[i, holes] = 0
            self.rows[i, request.columns] = request.live
        rows = [int(block) for i in due for block in self.rows[i]]
        new = upload(rows, self.pool.device, torch.int32).view(len(due), -1)
        self.table.index_copy_(0, upload(due, self.pool.device), new)
