# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What eviction needs from a model runner of vLLM; `runner_v1` and `runner_v2` provide it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from gkv_vllm.worker.evictor import Evictor


class RunnerAdapter(Protocol):
    """Requests by id, block tables by KV cache group; called between two steps of the runner."""

    def set_blocks(self, request_id: str, group: int, blocks: list[int], ids: list[int]) -> None:
        """Write these ids at these logical blocks of a request's table, before inputs are built.

        A request that the runner does not know is left alone."""

    def row(self, request_id: str, group: int) -> Tensor:
        """The request's block table in logical order, 0 where it has a hole: [blocks] int.

        On the runner's device, not to be written, and maybe longer than the request."""

    def batch(self, metadata: CommonAttentionMetadata) -> dict[str, int]:
        """Request id to row of the batch whose metadata is built."""


def watch_builders(model_runner: Any, evictor: Evictor, groups: list[int]) -> None:
    """Tell the evictor about each batch of these KV cache groups; squeeze with its operators."""
    for group in groups:
        for attention_group in model_runner.attn_groups[group]:
            for builder in attention_group.metadata_builders:
                builder.observe = partial(evictor.begin_forward, group)
                builder.squeeze = evictor.scorer.ops.squeeze_live_table
