# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The decode loop's block tables: what is lost becomes a hole, and is used again at the end."""

from __future__ import annotations

import pytest
import torch
from gpu.common import TINY
from gpu.pool import Batch, Pool, most_blocks
from gpu.requests import Requests

from gkv_vllm.ops.live_table import squeeze

REQUESTS, BUDGET, STEPS = 3, 64, 40


@pytest.fixture
def pool() -> Pool:
    blocks = 1 + REQUESTS * Requests.blocks_each(TINY, BUDGET)
    return Pool(TINY, blocks, "cpu")


def evict(requests: Requests) -> None:
    if due := requests.due():
        requests.lose(due, requests.batch(due, torch.zeros(0)))


def test_the_live_table_is_what_the_host_holds(pool: Pool) -> None:
    requests = Requests(pool, REQUESTS, BUDGET, STEPS)
    size, lost = TINY.block_size, 0
    for _ in range(STEPS):
        evict(requests)
        requests.grow()
        live = squeeze(requests.table, requests.lens, size)
        for row, request in enumerate(requests.all):
            count = live.seq_lens[row].item()
            assert count == request.live_tokens and BUDGET < count <= requests.longest
            used = -(-count // size)
            assert live.block_table[row, :used].tolist() == request.live[:used]
        lost = sum(request.lost for request in requests.all)
    assert lost >= REQUESTS * TINY.interval


def test_no_block_is_in_two_places(pool: Pool) -> None:
    requests = Requests(pool, REQUESTS, BUDGET, STEPS)
    for _ in range(STEPS):
        evict(requests)
        requests.grow()
        blocks = requests.table[requests.table != 0]
        assert len(blocks) == len(blocks.unique()) == pool.num_blocks - 1


def test_protected_blocks_and_the_newest_never_go(pool: Pool) -> None:
    requests = Requests(pool, REQUESTS, BUDGET, STEPS)
    first = [request.live[0] for request in requests.all]
    newest = []
    for _ in range(STEPS):
        for i in requests.due():
            newest.append((i, requests.all[i].live[-1]))
        evict(requests)
        for i, block in newest:
            assert block in requests.all[i].live
        newest.clear()
        requests.grow()
    assert [request.live[0] for request in requests.all] == first
    assert requests.table[:, 0].tolist() == first


def test_without_eviction_lengths_go_round_and_the_table_stays(pool: Pool) -> None:
    requests, table = Requests(pool, REQUESTS, BUDGET, STEPS), None
    table = requests.table.clone()
    evicting = Requests(pool, REQUESTS, BUDGET, STEPS)
    for _ in range(STEPS):
        if due := requests.due():
            requests.shorten(due)
        evict(evicting)
        requests.grow()
        evicting.grow()
        # The same work for attention in both, which is what the comparison rests on.
        lens = [request.live_tokens for request in evicting.all]
        assert requests.lens.tolist() == [request.tokens for request in requests.all] == lens
    assert torch.equal(requests.table, table)


def test_queries_are_recorded_in_the_steps_that_make_the_window(pool: Pool) -> None:
    requests = Requests(pool, REQUESTS, BUDGET, STEPS)
    recorded: list[list[int]] = [[] for _ in requests.all]
    for _ in range(STEPS):
        for i in requests.due():
            window = range(requests.all[i].tokens - TINY.window, requests.all[i].tokens)
            if len(recorded[i]) >= TINY.window:
                assert recorded[i][-TINY.window :] == list(window)
        evict(requests)
        slots = requests.recorded()
        for i, slot in enumerate(slots):
            assert slot in (-1, i)
            if slot >= 0:
                recorded[i].append(requests.all[i].tokens)  # the position of the coming token
        requests.grow()
    assert all(len(positions) >= TINY.window for positions in recorded)


def test_an_event_takes_an_interval_off_a_batch(pool: Pool) -> None:
    batch = Batch(pool, REQUESTS, BUDGET + TINY.interval)
    gone = (batch.candidate_blocks - batch.keep_blocks) * TINY.block_size
    assert gone == TINY.interval
    assert batch.tables.shape == (1, REQUESTS, batch.blocks)
    assert len(batch.tables.unique()) == batch.tables.numel() and 0 not in batch.tables


def test_a_pool_holds_its_largest_combination_and_the_null_block() -> None:
    assert most_blocks(TINY, [(1, 96), (3, 33)]) == 1 + 9
