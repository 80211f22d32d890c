# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What eviction needs from a model runner of vLLM; `runner_v1` and `runner_v2` provide it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from vllm.v1.attention.backend import CommonAttentionMetadata


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

    def lost(self, request_id: str, blocks: int) -> None:
        """The request has so many holes more, in each KV cache group."""

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests gave all their blocks back."""

    def holes(self, metadata: CommonAttentionMetadata) -> np.ndarray | None:
        """How many holes each request of the batch has, in order of its rows; None for none."""


def watch_builders(
    model_runner: Any, prepare: Callable[[int], Callable[[Any], Any]], groups: list[int]
) -> None:
    """Let the metadata builders of these KV cache groups prepare each batch before they use it."""
    for group in groups:
        of_group = prepare(group)
        for attention_group in model_runner.attn_groups[group]:
            for builder in attention_group.metadata_builders:
                builder.prepare = of_group
