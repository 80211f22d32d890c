# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Reads and writes the block tables of vLLM's Model Runner V2, which live on the device."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

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
