# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Reads and writes the request state and block tables of vLLM's V1 model runner."""

from __future__ import annotations

from typing import Any, Protocol

from gkv_vllm.attention.live_table import NULL_BLOCK


class RunnerAdapter(Protocol):
    """What eviction needs from a model runner; `drop_blocks` comes before inputs are built."""

    def drop_blocks(self, request_id: str, blocks: list[int]) -> None:
        """Null these logical blocks in the request's table, wherever the runner keeps it."""

    def block_ids(self, request_id: str, group: int) -> list[int]:
        """The request's table in one KV cache group, in logical order, 0 where it has a hole."""

    def batch(self) -> dict[str, int]:
        """Request id to row of the step whose inputs are built."""


class V1Runner:
    """Adapter for `GPUModelRunner` and `CPUModelRunner` of vLLM's V1 runner."""

    def __init__(self, model_runner: Any, group_ids: list[int]) -> None:
        self.runner = model_runner
        self.group_ids = group_ids

    def drop_blocks(self, request_id: str, blocks: list[int]) -> None:
        """A row is rebuilt from the request's state when it re-enters the batch, so null both."""
        state = self.runner.requests.get(request_id)
        if state is None:
            return
        row = self.runner.input_batch.req_id_to_index.get(request_id)
        for group in self.group_ids:
            table = state.block_ids[group]
            for block in blocks:
                table[block] = NULL_BLOCK
            if row is not None:
                self.runner.input_batch.block_table[group].block_table.np[row, blocks] = NULL_BLOCK

    def block_ids(self, request_id: str, group: int) -> list[int]:
        return self.runner.requests[request_id].block_ids[group]

    def batch(self) -> dict[str, int]:
        return self.runner.input_batch.req_id_to_index
