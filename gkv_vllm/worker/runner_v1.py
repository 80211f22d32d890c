# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Reads and writes the request state and block tables of vLLM's V1 model runner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from gkv_vllm.ops.upload import upload

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.attention.backend import CommonAttentionMetadata


class V1Runner:
    """Adapter for `GPUModelRunner` and `CPUModelRunner` of vLLM's V1 runner."""

    def __init__(self, model_runner: Any) -> None:
        self.runner = model_runner
        self._holes: dict[str, int] = {}

    def set_blocks(self, request_id: str, group: int, blocks: list[int], ids: list[int]) -> None:
        """A row is rebuilt from the request's state when it re-enters the batch, so write both."""
        state = self.runner.requests.get(request_id)
        if state is None:
            return
        table = state.block_ids[group]
        for block, block_id in zip(blocks, ids, strict=True):
            table[block] = block_id
        row = self.runner.input_batch.req_id_to_index.get(request_id)
        if row is not None:
            self.runner.input_batch.block_table[group].block_table.np[row, blocks] = ids

    def row(self, request_id: str, group: int) -> Tensor:
        return upload(self.runner.requests[request_id].block_ids[group], self.runner.device)

    def batch(self, metadata: CommonAttentionMetadata) -> dict[str, int]:
        return self.runner.input_batch.req_id_to_index

    def lost(self, request_id: str, blocks: int) -> None:
        self._holes[request_id] = self._holes.get(request_id, 0) + blocks

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._holes.pop(request_id, None)

    def holes(self, metadata: CommonAttentionMetadata) -> np.ndarray | None:
        if not self._holes:
            return None
        return np.array([self._holes.get(id_, 0) for id_ in self.runner.input_batch.req_ids])
