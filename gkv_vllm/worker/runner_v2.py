# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Reads and writes the block tables of vLLM's Model Runner V2, which live on the device."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.attention.backend import CommonAttentionMetadata


class V2Runner:
    """Adapter for Model Runner V2 (`vllm.v1.worker.gpu.model_runner`).

    It keeps no copy of a table on the host. What is written here is staged beside vLLM's own new
    blocks and reaches the device with them, in one launch, before inputs are built. A resumed
    request comes back as a new one, with a whole new row."""

    def __init__(self, model_runner: Any) -> None:
        self.runner = model_runner
        self._holes = np.zeros(model_runner.max_num_reqs, dtype=np.int32)
        """By vLLM's index of a request, as the rows of its tables."""

    def set_blocks(self, request_id: str, group: int, blocks: list[int], ids: list[int]) -> None:
        """Stage one write for each run of neighbouring blocks."""
        index = self.runner.req_states.req_id_to_index.get(request_id)
        if index is None:
            return
        table = self.runner.block_tables.block_tables[group]
        # Neighbours have the same distance to their place in the list.
        for _, run in groupby(enumerate(blocks), key=lambda place: place[1] - place[0]):
            places = [place for place, _ in run]
            table.stage_write(index, blocks[places[0]], [ids[place] for place in places])

    def row(self, request_id: str, group: int) -> Tensor:
        index = self.runner.req_states.req_id_to_index[request_id]
        return self.runner.block_tables.block_tables[group].gpu[index]

    def batch(self, metadata: CommonAttentionMetadata) -> dict[str, int]:
        assert metadata.req_idx is not None
        names = self.runner.req_states.index_to_req_id
        return {names[index]: row for row, index in enumerate(metadata.req_idx.tolist())}

    def lost(self, request_id: str, blocks: int) -> None:
        index = self.runner.req_states.req_id_to_index.get(request_id)
        if index is not None:
            self._holes[index] += blocks

    def forget(self, request_ids: Iterable[str]) -> None:
        """Before vLLM gives their indices to others."""
        indices = self.runner.req_states.req_id_to_index
        for request_id in request_ids:
            if (index := indices.get(request_id)) is not None:
                self._holes[index] = 0

    def holes(self, metadata: CommonAttentionMetadata) -> np.ndarray | None:
        assert metadata.req_idx is not None
        return self._holes[metadata.req_idx]
