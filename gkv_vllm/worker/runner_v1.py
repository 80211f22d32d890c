# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Reads and writes the request state and block tables of vLLM's V1 model runner."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol


class RunnerAdapter(Protocol):
    """What eviction needs from a model runner; `set_blocks` comes before inputs are built."""

    def set_blocks(self, request_id: str, group: int, blocks: list[int], ids: list[int]) -> None:
        """Write these ids at these logical blocks of a request's table, wherever it is kept.

        group: the KV cache group. A request that the runner does not know is left alone."""

    def block_ids(self, request_id: str, group: int) -> list[int]:
        """The request's table in one KV cache group, in logical order, 0 where it has a hole."""

    def batch(self) -> dict[str, int]:
        """Request id to row of the step whose inputs are built."""


class V1Runner:
    """Adapter for `GPUModelRunner` and `CPUModelRunner` of vLLM's V1 runner."""

    def __init__(self, model_runner: Any) -> None:
        self.runner = model_runner

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

    def block_ids(self, request_id: str, group: int) -> list[int]:
        return self.runner.requests[request_id].block_ids[group]

    def batch(self) -> dict[str, int]:
        return self.runner.input_batch.req_id_to_index

    def watch(self, evictor: Any, groups: list[int]) -> None:
        """Tell the evictor about each batch of these KV cache groups; squeeze with its ops."""
        for group in groups:
            for attention_group in self.runner.attn_groups[group]:
                for builder in attention_group.metadata_builders:
                    builder.observe = partial(evictor.begin_forward, group)
                    builder.squeeze = evictor.scorer.ops.squeeze_live_table
