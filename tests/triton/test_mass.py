# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What requests accumulate from step to step, also in a captured graph, and what h2o keeps of them,
is what the readable operators accumulate and keep."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gkv_vllm.triton_kernels import attention_mass
from vllm.v1.attention.backend import CommonAttentionMetadata

from gkv_vllm.ops.layout import CPULayout
from gkv_vllm.ops.paged import PagedOps, ReferenceOps
from gkv_vllm.ops.triton import TritonOps
from gkv_vllm.policies.h2o import H2O
from gkv_vllm.worker.device_batch import DeviceBatch
from gkv_vllm.worker.mass import MassBatch, MassIndex

from ..policies.paged_requests import CPU, Cache, Model, Request

EPSILON = torch.finfo(torch.float32).eps
MAX_ROWS, WIDTH = 6, 24
MODELS = {
    "gqa4": Model(query_heads=8, kv_heads=2, head_dim=32, window=5, block_size=16),
    "no_group_softcap": Model(5, 5, 16, window=7, block_size=8, softcap=3.0),
    "gqa7_bf16": Model(14, 2, 64, window=3, block_size=16, dtype=torch.bfloat16),
}


class FirstBatch(MassIndex):
    """What a captured graph knows of a batch: where that of its capture lay."""

    def fill(self, group: int, *tensors: Any) -> None:
        self.batches.setdefault(group, MassBatch(*tensors))


class Replayed(Cache):
    """Every step is a replay of one graph, captured when nothing had happened yet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mass = FirstBatch()
        for layer in self.layers:
            layer.mass = self.mass
        self.starts = torch.zeros(MAX_ROWS + 1, dtype=torch.int32)
        self.protected: list[int] | None = None
        evictor = SimpleNamespace(protected=lambda _, rows: self.protected, holes=lambda _: None)
        self.prepare = DeviceBatch(
            evictor,  # type: ignore[arg-type]
            self.layers[0].ops,
            block_size=self.model.block_size,
            max_rows=MAX_ROWS,
            group=0,
            ring_index=None,
            mass_index=self.mass,
            device=CPU,
        )
        self._accumulate([], [0])
        before = [layer.plane.clone() for layer in self.layers if layer.plane is not None]
        size = (MAX_ROWS, self.model.query_heads, self.model.head_dim)
        for layer, plane in zip(self.layers, before, strict=True):
            layer.after_attention(torch.ones(size, dtype=self.model.dtype))
            torch.testing.assert_close(layer.plane, plane, rtol=0, atol=0, equal_nan=True)

    def _accumulate(self, requests: Sequence[Request], starts: list[int]) -> None:
        """The batch as a runner pads it, over tables with holes."""
        padding = MAX_ROWS - len(requests)
        self.starts.copy_(torch.tensor(starts + [starts[-1]] * padding))
        table = torch.full((MAX_ROWS, WIDTH), 999, dtype=torch.int32)
        for row, request in enumerate(requests):
            table[row, : len(request.table)] = torch.tensor(request.table)
        seq_lens = [r.num_tokens for r in requests] + [0] * padding
        protected = [r.protected * self.model.block_size for r in requests]
        self.protected = protected + [-1] * padding if requests else None
        self.prepare(
            CommonAttentionMetadata(
                query_start_loc=self.starts,
                query_start_loc_cpu=self.starts,
                seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
                num_reqs=MAX_ROWS,
                num_actual_tokens=starts[-1],
                max_query_len=1,
                max_seq_len=1,
                block_table_tensor=table,
                slot_mapping=torch.zeros(1, dtype=torch.int64),
            )
        )


def story(cache: Cache) -> list[Any]:
    """Chunks of prompts beside decoding requests, evictions between them; the held tokens."""
    model = cache.model
    size = model.block_size
    a, b, c = (
        Request.random(model, 20 * size, seed=i, protected=protected)
        for i, protected in enumerate((0, 2, 1))
    )
    cache.step((a, 4 * size + 3), (b, 2 * size))
    cache.step((b, size + 5), (a, 1))
    scores = [cache.evict(a, 2).clone()]
    cache.step((a, 1), (c, 1), (b, 3 * size))
    cache.step((c, 3 * size + 1), (a, 2 * size), (b, 1))
    for request, keep in ((b, 1), (a, 2), (c, 1)):
        scores.append(cache.evict(request, keep).clone())
    cache.step((c, 1), (b, 1), (a, 1))
    return [scores, [request.held for request in (a, b, c)], [x.plane for x in cache.layers]]


@pytest.mark.parametrize("moves_tokens", [False, True], ids=["block", "token"])
@pytest.mark.parametrize(
    ("model", "cache"),
    [*((model, Replayed) for model in MODELS.values()), (MODELS["gqa4"], Cache)],
    ids=[*MODELS, "gqa4, eager"],
)
def test_h2o_is_that_of_the_readable_operators(
    model: Model, cache: type[Cache], moves_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_mass, "PROGRAMS", 1)
    kernels: PagedOps = TritonOps(CPULayout())
    expected = story(Cache(model, H2O(), ReferenceOps(), moves_tokens=moves_tokens))
    found = story(cache(model, H2O(), kernels, moves_tokens=moves_tokens))
    # Relative, as in test_attention_mass: twice the error of a logit, below 64, and of the sum.
    tolerance = EPSILON * (2 * 64 + 16 + 20 * model.block_size)
    for ours, theirs in zip(found[0] + found[2], expected[0] + expected[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0, equal_nan=True)
    assert all(map(torch.equal, found[1], expected[1]))
