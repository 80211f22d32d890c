# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Carries out a step plan on the worker: compact, drop, reset, record, score. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from gkv_vllm.engine.plan import StepPlan, WorkerReport
from gkv_vllm.ops.live_table import NULL_BLOCK
from gkv_vllm.ops.upload import to_host, upload
from gkv_vllm.worker.mass import MassIndex
from gkv_vllm.worker.rings import RingIndex
from gkv_vllm.worker.runner import RunnerAdapter
from gkv_vllm.worker.scorer import BlockTable, Scorer
from gkv_vllm.worker.stopwatch import Stopwatch

if TYPE_CHECKING:
    import numpy as np
    from vllm.v1.attention.backend import CommonAttentionMetadata

T = TypeVar("T")


class Evictor:
    """One step: `begin`, then vLLM's forward (which calls `begin_forward`), then `finish`."""

    def __init__(
        self,
        runner: RunnerAdapter,
        scorer: Scorer,
        layer_group_of: dict[int, int],
        *,
        ring_index: RingIndex | None = None,
        mass_index: MassIndex | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """stopwatch: by the host's clock unless it is given."""
        self.runner = runner
        self.scorer = scorer
        self.layer_group_of = layer_group_of
        """KV cache groups that lose blocks, and the layer group of each."""
        self.ring_index = ring_index
        self.mass_index = mass_index
        self.plan: StepPlan | None = None
        self.in_step = False
        """Whether a batch is a step of the engine, and not one that warms up or is captured."""
        self.stopwatch = stopwatch or Stopwatch()

    def begin(self, plan: StepPlan | None, gone: Iterable[str] = ()) -> None:
        """Before the runner builds its inputs, and before it writes or zeroes any block.

        gone: requests that ended or were preempted since the last step."""
        self.plan, self.in_step = plan, True
        self._clear_indices()
        self.runner.forget(gone)
        if plan is None:
            return
        orders = [(order, self._table(id_)) for id_, order in plan.compact.items()]
        self._timed(len(orders), partial(self.scorer.compact, orders))
        for request_id, order in plan.compact.items():
            for group, ids in order.fresh.items():
                self.runner.set_blocks(request_id, group, list(ids), list(ids.values()))
        for request_id, dropped in plan.drops.items():
            for group, layer_group in self.layer_group_of.items():
                blocks = dropped[layer_group]
                self.runner.set_blocks(request_id, group, blocks, [NULL_BLOCK] * len(blocks))
            self.runner.lost(request_id, len(dropped[0]))
        self.scorer.reset(plan.reset)

    def begin_forward(
        self, group: int, metadata: CommonAttentionMetadata, live: CommonAttentionMetadata
    ) -> None:
        """The batch of a KV cache group is known, as the runner sees it and as attention will."""
        if self.plan is None:
            return
        if self.plan.record and self.ring_index is not None and not self.ring_index.filled:
            rows, starts = self.runner.batch(metadata), metadata.query_start_loc_cpu.tolist()
            self.ring_index.fill(
                [
                    (recording, starts[rows[request_id]], starts[rows[request_id] + 1])
                    for request_id, recording in self.plan.record.items()
                ]
            )
        if self.plan.accumulate and self.mass_index is not None:
            protected = self.protected(metadata, len(live.seq_lens))
            assert protected is not None
            self.mass_index.fill(
                group,
                live.block_table_tensor,
                live.seq_lens,
                live.query_start_loc,
                upload(protected, live.seq_lens.device, torch.int32),
            )

    def slots(self, metadata: CommonAttentionMetadata, rows: int) -> list[int] | None:
        """The ring slot of each row of the batch, -1 where its queries are not kept."""
        if self.plan is None or not self.plan.record:
            return None
        slots, row_of = [-1] * rows, self.runner.batch(metadata)
        for request_id, recording in self.plan.record.items():
            slots[row_of[request_id]] = recording.slot
        return slots

    def protected(self, metadata: CommonAttentionMetadata, rows: int) -> list[int] | None:
        """The protected tokens of each row that accumulates attention, -1 for the others."""
        if self.plan is None or not self.plan.accumulate:
            return None
        protected, row_of = [-1] * rows, self.runner.batch(metadata)
        for request_id, tokens in self.plan.accumulate.items():
            protected[row_of[request_id]] = tokens
        return protected

    def holes(self, metadata: CommonAttentionMetadata) -> np.ndarray | None:
        """How many blocks each request of the batch has lost: [rows that are not padding]."""
        return self.runner.holes(metadata) if self.in_step else None

    def finish(self) -> WorkerReport | None:
        """After the forward: what happened in this step, if anything did."""
        plan, self.plan, self.in_step = self.plan, None, False
        # A dummy batch may run before the next plan: it must leave no trace.
        self._clear_indices()
        observed = plan.observe if plan else {}
        due = [(seen.selection, self._table(id_)) for id_, seen in observed.items()]
        found = self._timed(len(due), partial(self.scorer.block_scores, due))
        scores = {
            id_: (seen.epoch, to_host(of_request))
            for (id_, seen), of_request in zip(observed.items(), found or (), strict=True)
        }
        kept, self.scorer.kept = self.scorer.kept, {}
        events, seconds = self.stopwatch.take()
        return WorkerReport(scores, events, seconds, kept) if scores or events or kept else None

    def _table(self, request_id: str) -> BlockTable:
        return partial(self.runner.row, request_id)

    def _timed(self, events: int, work: Callable[[], T]) -> T | None:
        return self.stopwatch.time(events, work) if events else None

    def _clear_indices(self) -> None:
        if self.ring_index is not None:
            self.ring_index.clear()
        if self.mass_index is not None:
            self.mass_index.clear()
