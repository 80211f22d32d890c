# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The V1 runner adapter on vLLM's real input batch and request state; no model runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from gkv_vllm.worker.runner_v1 import V1Runner

EVICTABLE, OTHER = 0, 1
TABLES = {
    "ragged": [11, 12, 13, 14, 15],
    "short": [21],
    "waiting": [31, 32, 33],
}


def state(request_id: str) -> CachedRequestState:
    blocks = TABLES[request_id]
    return CachedRequestState(
        req_id=request_id,
        prompt_token_ids=[1, 2, 3],
        mm_features=[],
        sampling_params=SamplingParams(),
        generator=None,
        block_ids=(list(blocks), [block + 100 for block in blocks]),
        num_computed_tokens=0,
        output_token_ids=[],
    )


@pytest.fixture
def model_runner() -> SimpleNamespace:
    """What the adapter touches of a runner: three requests, of which one is not in the batch."""
    batch = InputBatch(
        max_num_reqs=4,
        max_model_len=256,
        max_num_batched_tokens=64,
        device=torch.device("cpu"),
        vocab_size=16,
        block_sizes=[32, 32],
        max_num_blocks_per_req=[8, 8],
    )
    requests = {request_id: state(request_id) for request_id in TABLES}
    for request_id in ("ragged", "short"):
        batch.add_request(requests[request_id])
    batch.refresh_metadata()
    return SimpleNamespace(requests=requests, input_batch=batch, device=torch.device("cpu"))


@pytest.fixture
def adapter(model_runner: SimpleNamespace) -> V1Runner:
    return V1Runner(model_runner)


def row(model_runner: SimpleNamespace, request_id: str, group: int = EVICTABLE) -> list[int]:
    batch = model_runner.input_batch
    table = batch.block_table[group].get_numpy_array()
    return table[batch.req_id_to_index[request_id]].tolist()


def drop(adapter: V1Runner, request_id: str, blocks: list[int]) -> None:
    adapter.set_blocks(request_id, EVICTABLE, blocks, [0] * len(blocks))


def test_dropped_blocks_are_null_in_the_row_and_in_the_state(
    model_runner: SimpleNamespace, adapter: V1Runner
) -> None:
    drop(adapter, "ragged", [1, 3])
    assert adapter.row("ragged", EVICTABLE).tolist() == [11, 0, 13, 0, 15]
    assert row(model_runner, "ragged") == [11, 0, 13, 0, 15, 0, 0, 0]


def test_a_block_that_gave_way_to_a_fresh_one_is_replaced_in_both(
    model_runner: SimpleNamespace, adapter: V1Runner
) -> None:
    adapter.set_blocks("ragged", EVICTABLE, [0, 3], [41, 44])
    assert adapter.row("ragged", EVICTABLE).tolist() == [41, 12, 13, 44, 15]
    assert row(model_runner, "ragged") == [41, 12, 13, 44, 15, 0, 0, 0]


def test_dropping_changes_no_other_request_group_or_length(
    model_runner: SimpleNamespace, adapter: V1Runner
) -> None:
    drop(adapter, "ragged", [0, 2])
    assert adapter.row("short", EVICTABLE).tolist() == [21]
    assert row(model_runner, "short")[:1] == [21]
    assert row(model_runner, "ragged", OTHER)[:5] == [111, 112, 113, 114, 115]
    assert model_runner.requests["ragged"].block_ids[OTHER] == [111, 112, 113, 114, 115]
    assert model_runner.input_batch.block_table[EVICTABLE].num_blocks_per_row[:2].tolist() == [5, 1]


def test_each_group_loses_its_own_blocks(model_runner: SimpleNamespace, adapter: V1Runner) -> None:
    adapter.set_blocks("ragged", OTHER, [2], [0])
    assert row(model_runner, "ragged")[:5] == [11, 12, 13, 14, 15]
    assert row(model_runner, "ragged", OTHER)[:5] == [111, 112, 0, 114, 115]
    assert adapter.row("ragged", OTHER).tolist() == [111, 112, 0, 114, 115]


def test_the_device_table_of_the_next_step_has_the_holes(
    model_runner: SimpleNamespace, adapter: V1Runner
) -> None:
    drop(adapter, "ragged", [1])
    table = model_runner.input_batch.block_table
    table.commit_block_table(2)
    assert table[EVICTABLE].get_device_tensor(2)[0, :5].tolist() == [11, 0, 13, 14, 15]


def test_new_blocks_are_appended_after_the_holes(
    model_runner: SimpleNamespace, adapter: V1Runner
) -> None:
    drop(adapter, "ragged", [1, 2])
    index = model_runner.input_batch.req_id_to_index["ragged"]
    model_runner.input_batch.block_table.append_row(([16], [116]), index)
    assert row(model_runner, "ragged")[:6] == [11, 0, 0, 14, 15, 16]


def test_holes_survive_leaving_and_re_entering_the_batch(
    model_runner: SimpleNamespace, adapter: V1Runner
) -> None:
    drop(adapter, "ragged", [1, 3])
    batch = model_runner.input_batch
    batch.remove_request("ragged")
    batch.condense()
    assert row(model_runner, "short")[:2] == [21, 0]
    batch.add_request(model_runner.requests["ragged"])
    assert row(model_runner, "ragged")[:5] == [11, 0, 13, 0, 15]


def test_holes_move_with_their_row(model_runner: SimpleNamespace, adapter: V1Runner) -> None:
    drop(adapter, "ragged", [0])
    model_runner.input_batch.swap_states(0, 1)
    assert row(model_runner, "ragged")[:5] == [0, 12, 13, 14, 15]
    assert row(model_runner, "short")[:1] == [21]


def test_a_request_outside_the_batch_keeps_its_holes_for_later(
    model_runner: SimpleNamespace, adapter: V1Runner
) -> None:
    before = model_runner.input_batch.block_table[EVICTABLE].get_numpy_array().copy()
    drop(adapter, "waiting", [0, 1])
    assert adapter.row("waiting", EVICTABLE).tolist() == [0, 0, 33]
    assert (model_runner.input_batch.block_table[EVICTABLE].get_numpy_array() == before).all()
    model_runner.input_batch.add_request(model_runner.requests["waiting"])
    assert row(model_runner, "waiting")[:3] == [0, 0, 33]


def test_a_request_that_has_gone_is_ignored(adapter: V1Runner) -> None:
    drop(adapter, "finished", [0, 1])
    assert adapter.row("ragged", EVICTABLE).tolist() == TABLES["ragged"]


def test_the_batch_is_the_runners_own_order(
    model_runner: SimpleNamespace, adapter: V1Runner
) -> None:
    assert adapter.batch(None) == {"ragged": 0, "short": 1}
    model_runner.input_batch.swap_states(0, 1)
    assert adapter.batch(None) == {"ragged": 1, "short": 0}
