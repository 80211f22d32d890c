# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Carries out a step plan on the worker: drop, reset, record, score. Decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gkv_vllm.engine.plan import BlockScores, StepPlan
from gkv_vllm.worker.rings import RingIndex
from gkv_vllm.worker.runner_v1 import RunnerAdapter
from gkv_vllm.worker.scorer import BlockScorer

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


class Evictor:
    """One step: `begin`, then vLLM's forward (which calls `begin_forward`), then `finish`."""

    def __init__(
        self, runner: RunnerAdapter, scorer: BlockScorer | None, ring_index: RingIndex | None
    ) -> None:
        self.runner = runner
        self.scorer = scorer
        self.ring_index = ring_index
        self.plan: StepPlan | None = None

    def begin(self, plan: StepPlan | None) -> None:
        """Before the runner builds its inputs."""
        self.plan = plan
        if self.ring_index is not None:
            self.ring_index.clear()
        if plan is None:
            return
        for request_id, blocks in plan.drops.items():
            self.runner.drop_blocks(request_id, blocks)
        if plan.reset and self.scorer is not None:
            self.scorer.reset(plan.reset)

    def begin_forward(self, metadata: CommonAttentionMetadata) -> None:
        """The batch is known: say which of its tokens the rings keep."""
        if self.plan is None or not self.plan.record or self.ring_index is None:
            return
        rows, starts = self.runner.batch(), metadata.query_start_loc_cpu.tolist()
        self.ring_index.fill(
            [
                (recording, starts[rows[request_id]], starts[rows[request_id] + 1])
                for request_id, recording in self.plan.record.items()
            ]
        )

    def finish(self) -> BlockScores | None:
        """After the forward: the scores of the observed requests, if there are any."""
        plan, self.plan = self.plan, None
        if self.ring_index is not None:
            # A dummy batch may run before the next plan: it must not reach the rings.
            self.ring_index.clear()
        if plan is None or not plan.observe or self.scorer is None:
            return None
        return self.scorer.score(plan.observe, self.runner.block_ids)
