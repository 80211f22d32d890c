# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Holes in vLLM's real block tables: reference counts, the prefix cache, admission, the spec."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from gkv_vllm.config import KVPolicyConfig
from gkv_vllm.engine.block_manager import GKVBlockManager, register_spec
from gkv_vllm.engine.footprint import blocks_for, bounded_blocks
from gkv_vllm.engine.spec import GKVSpec, in_flight_tokens

BLOCK, POOL = 4, 21
POLICY = {"policy": "gkv", "granularity": "block", "budget": 16, "interval": 8, "window": 4}
PROMPT = list(range(100, 112))


class Cache:
    """vLLM's KVCacheManager over one GKVSpec group, and the requests that use it."""

    def __init__(self, config: Any, new_request: Callable[..., Any]) -> None:
        self.manager = KVCacheManager(
            config,
            max_model_len=512,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            enable_caching=True,
        )
        (self.group,) = self.manager.coordinator.single_type_managers
        self.pool = self.manager.block_pool
        self.new_request = new_request
        self.requests: dict[str, Any] = {}

    def start(self, request_id: str, prompt: list[int] = PROMPT) -> int:
        """Admit a request and compute its prompt; returns how many tokens were cached."""
        request = self.requests.get(request_id)
        if request is None:
            request = self.new_request(request_id, prompt, block_size=BLOCK)
            self.requests[request_id] = request
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        assert self.manager.allocate_slots(request, request.num_tokens - hit, hit, blocks)
        request.num_computed_tokens = request.num_tokens
        return hit

    def decode(self, request_id: str, steps: int) -> None:
        request = self.requests[request_id]
        for _ in range(steps):
            request.append_output_token_ids(7)
            assert self.manager.allocate_slots(request, 1)
            request.num_computed_tokens += 1

    def evict(self, request_id: str, *blocks: int) -> int:
        exact = self.requests[request_id].num_computed_tokens
        return self.group.evict(request_id, blocks, exact)

    def repurpose(
        self, request_id: str, targets: list[int], fresh: list[int] | None = None
    ) -> dict[int, int]:
        exact = self.requests[request_id].num_computed_tokens
        return self.group.repurpose(request_id, targets, fresh or [], exact)

    def hashed(self, request_id: str) -> list[int]:
        """The logical blocks of a request that the prefix cache knows."""
        blocks = self.group.req_to_blocks[request_id]
        return [i for i, block in enumerate(blocks) if block.block_hash is not None]

    def preempt(self, request_id: str) -> None:
        self.manager.free(self.requests[request_id])
        self.requests[request_id].num_computed_tokens = 0

    def table(self, request_id: str) -> list[int]:
        return [block.block_id for block in self.group.req_to_blocks[request_id]]

    def hit_of(self, tokens: list[int]) -> int:
        """Tokens that a request with exactly this prompt (and one more) would find cached."""
        probe = self.new_request("probe", [*tokens, 0], block_size=BLOCK)
        return self.manager.get_computed_blocks(probe)[1]

    def check(self) -> None:
        """Every block is either free or held as often as tables name it."""
        tables = self.group.req_to_blocks.values()
        held = Counter(b.block_id for table in tables for b in table if not b.is_null)
        free = [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]
        assert len(free) == len(set(free)) == self.pool.get_num_free_blocks()
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == held[block.block_id]
            assert (block.block_id in free) == (block.ref_cnt == 0)
        assert 0 not in free


@pytest.fixture
def cache(kv_cache_config: Callable[..., Any], new_request: Callable[..., Any]) -> Any:
    made = Cache(kv_cache_config(POLICY, block_size=BLOCK, num_blocks=POOL), new_request)
    yield made
    made.check()


# ---- evicting


def test_vllm_picks_our_manager_for_our_spec_only(cache: Cache) -> None:
    assert type(cache.group) is GKVBlockManager
    register_spec()  # twice does nothing
    stock = FullAttentionSpec(block_size=4, num_kv_heads=1, head_size=1, dtype=torch.float32)
    assert KVCacheSpecRegistry.get_manager_class(stock) is FullAttentionManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(cache.group.kv_cache_spec) is (
        FullAttentionSpec
    )


def test_private_blocks_return_to_the_pool(cache: Cache) -> None:
    cache.start("a")
    cache.decode("a", 12)
    before, free = cache.table("a"), cache.pool.get_num_free_blocks()
    assert cache.evict("a", 3, 4) == 2
    assert cache.pool.get_num_free_blocks() == free + 2
    assert cache.table("a") == [*before[:3], 0, 0, *before[5:]]


def test_evicting_holes_does_nothing(cache: Cache) -> None:
    cache.start("a")
    cache.decode("a", 12)
    cache.evict("a", 3)
    free, table = cache.pool.get_num_free_blocks(), cache.table("a")
    assert cache.evict("a", 3) == 0
    assert cache.evict("a") == 0
    assert (cache.pool.get_num_free_blocks(), cache.table("a")) == (free, table)
    assert cache.evict("a", 3, 4) == 1


def test_shared_blocks_lose_one_reference_and_stay(cache: Cache) -> None:
    cache.start("a")
    assert cache.start("b") == 8
    shared = cache.table("b")[0]
    free = cache.pool.get_num_free_blocks()
    assert cache.evict("a", 0, 1) == 0
    cache.check()
    assert cache.pool.get_num_free_blocks() == free
    assert cache.table("b")[0] == shared
    assert cache.hit_of(PROMPT) == 12, "an eviction threw shared blocks out of the prefix cache"
    assert cache.evict("b", 0, 1) == 2


def test_freed_cached_block_can_be_hit_again(cache: Cache) -> None:
    cache.start("a")
    assert cache.evict("a", 0) == 1
    assert cache.start("b") == 8
    assert 0 not in cache.table("b")


def test_cached_blocks_are_reused_from_the_tail_on(cache: Cache) -> None:
    # A cached block is of use only behind its predecessors.
    cache.start("a")
    first, second, third = cache.table("a")
    cache.evict("a", 0, 1, 2)
    free = [block.block_id for block in cache.pool.free_block_queue.get_all_free_blocks()]
    assert free[-3:] == [third, second, first]


def test_request_with_holes_grows_at_its_end(cache: Cache) -> None:
    cache.start("a")
    cache.decode("a", 8)
    cache.evict("a", 3)
    cache.decode("a", 9)
    assert len(cache.table("a")) == 8
    assert [i for i, block in enumerate(cache.table("a")) if block == 0] == [3]


def test_free_after_eviction_returns_every_block_once(cache: Cache) -> None:
    cache.start("a")
    cache.decode("a", 12)
    cache.evict("a", 1, 3, 4)
    cache.manager.free(cache.requests["a"])
    assert cache.pool.get_num_free_blocks() == POOL - 1
    assert cache.pool.null_block.is_null


# ---- the prefix cache


def test_only_exact_blocks_enter_the_prefix_cache(cache: Cache) -> None:
    cache.start("a")
    cache.decode("a", 7)  # 19 tokens: 4 full blocks, 3 tokens of the fifth
    cache.evict("a", 3)
    cache.decode("a", 20)
    tokens = list(cache.requests["a"].all_token_ids)
    blocks = cache.group.req_to_blocks["a"]
    hashed = [i for i, block in enumerate(blocks) if block.block_hash is not None]
    assert hashed == [0, 1, 2], "block 4 is exact in part, the later ones not at all"
    cache.manager.free(cache.requests["a"])
    assert cache.hit_of(tokens) == 16, "what was computed with the full context is lost"


def test_exact_blocks_that_fill_up_after_the_eviction_do_enter(cache: Cache) -> None:
    # As with asynchronous scheduling: at the eviction 20 tokens are scheduled, 18 are known.
    cache.start("a")
    cache.decode("a", 6)
    request = cache.requests["a"]
    cache.group.evict("a", [1], exact_tokens=20)
    cache.decode("a", 10)
    blocks = cache.group.req_to_blocks["a"]
    assert [i for i, b in enumerate(blocks) if b.block_hash is not None] == [0, 2, 3, 4]
    cache.manager.free(request)


def test_later_evictions_do_not_raise_the_limit(cache: Cache) -> None:
    cache.start("a")
    cache.decode("a", 4)
    cache.evict("a", 3)
    cache.decode("a", 8)
    cache.evict("a", 4)
    cache.decode("a", 8)
    blocks = cache.group.req_to_blocks["a"]
    assert [i for i, b in enumerate(blocks) if b.block_hash is not None] == [0, 1, 2]


def test_caching_works_again_after_a_preemption(cache: Cache) -> None:
    cache.start("a")
    cache.decode("a", 8)
    cache.evict("a", 3, 4)
    cache.decode("a", 4)
    cache.preempt("a")
    assert cache.start("a") == 20
    cache.decode("a", 8)
    blocks = cache.group.req_to_blocks["a"]
    assert [b.block_hash is not None for b in blocks] == [True] * 8
    tokens = list(cache.requests["a"].all_token_ids)
    assert cache.hit_of(tokens) == 32


def test_id_used_again_starts_exact(cache: Cache) -> None:
    cache.start("a")
    cache.evict("a", 1)
    cache.manager.free(cache.requests.pop("a"))
    cache.start("a", list(range(16)))
    assert all(block.block_hash is not None for block in cache.group.req_to_blocks["a"])


# ---- blocks that will hold other tokens


def test_private_blocks_are_those_that_nobody_else_holds(cache: Cache) -> None:
    cache.start("a")
    cache.decode("a", 4)
    assert cache.group.private("a", [0, 1, 2, 3]) == [True] * 4
    assert cache.start("b") == 8
    assert cache.group.private("a", [0, 1, 2, 3]) == [False, False, True, True]
    assert cache.group.private("b", [2, 0]) == [True, False]
    cache.manager.free(cache.requests["b"])
    assert cache.group.private("a", [0, 1]) == [True, True], "a cached block is private as well"


def test_targets_leave_the_prefix_cache_and_stay_where_they_are(cache: Cache) -> None:
    cache.start("a")
    cache.decode("a", 8)
    tokens, table = list(cache.requests["a"].all_token_ids), cache.table("a")
    free = cache.pool.get_num_free_blocks()
    assert cache.hashed("a") == [0, 1, 2, 3, 4]
    assert cache.repurpose("a", [1, 3]) == {}
    assert cache.hashed("a") == [0, 2, 4]
    assert cache.hit_of(tokens) == 4, "what lies behind a target is found"
    assert (cache.table("a"), cache.pool.get_num_free_blocks()) == (table, free)


def test_shared_targets_are_replaced_and_their_bytes_stay_with_the_others(cache: Cache) -> None:
    cache.start("a")
    cache.start("b")
    cache.decode("a", 4)
    before, free = cache.table("a"), cache.pool.get_num_free_blocks()
    fresh = cache.repurpose("a", [0, 2], [0])
    after = cache.table("a")
    assert fresh == {0: after[0]}
    assert after[1:] == before[1:]
    assert after[0] not in (*before, *cache.table("b"))
    assert cache.pool.get_num_free_blocks() == free - 1
    assert cache.table("b")[0] == before[0]
    assert cache.group.private("a", [0]) == [True]
    assert cache.group.private("b", [0]) == [True], "the reference was not given back"
    # The third block as well: "b" has computed one of its own.
    assert cache.hit_of(PROMPT) == 12, "what others hold left the prefix cache"


def test_replaced_block_that_only_the_cache_shares_can_be_hit_again(cache: Cache) -> None:
    # As with two tables, when the block of the other one is shared.
    cache.start("a")
    cache.repurpose("a", [0], [0])
    assert cache.hit_of(PROMPT) == 12
    assert cache.start("b") == 8


def test_fresh_block_takes_no_other_content_along(cache: Cache) -> None:
    other = list(range(300, 300 + 4 * (POOL - 1) - 1))
    cache.start("full", other)
    cache.manager.free(cache.requests.pop("full"))
    cache.start("a")
    assert cache.repurpose("a", [0], [0])
    assert cache.hashed("a") == [1, 2]


def test_nothing_from_the_first_target_on_is_cached_any_more(cache: Cache) -> None:
    cache.start("a")
    cache.decode("a", 7)  # the fifth block is computed in part
    cache.repurpose("a", [2, 3])
    cache.evict("a", 1)
    cache.decode("a", 12)
    assert cache.hashed("a") == [0]


def test_later_targets_only_lower_the_limit(cache: Cache) -> None:
    cache.start("a")
    cache.decode("a", 12)
    cache.group.repurpose("a", [3], [], exact_tokens=12)
    assert cache.group._exact_tokens["a"] == 12
    cache.group.repurpose("a", [4], [], exact_tokens=20)
    assert cache.group._exact_tokens["a"] == 12
    cache.group.repurpose("a", [1, 2], [], exact_tokens=20)
    assert cache.group._exact_tokens["a"] == 4
    cache.group.evict("a", [], exact_tokens=24)
    assert cache.group._exact_tokens["a"] == 4


def test_survivors_of_nothing_leave_the_limit_at_what_was_computed(cache: Cache) -> None:
    cache.start("a")
    assert cache.repurpose("a", []) == {}
    assert cache.group._exact_tokens["a"] == 12
    assert cache.hashed("a") == [0, 1, 2]


def test_repurposed_request_is_cached_again_after_a_preemption(cache: Cache) -> None:
    cache.start("a")
    cache.decode("a", 8)
    cache.repurpose("a", [1], [])
    cache.evict("a", 2, 3)
    cache.preempt("a")
    assert cache.start("a") == 4, "behind the target nothing may be found"
    assert cache.hashed("a") == [0, 1, 2, 3, 4]


# ---- admission


def fits(cache: Cache, request: Any) -> bool:
    blocks, hit, _ = cache.manager.get_computed_blocks(request)
    got = cache.manager.allocate_slots(request, 4, hit, blocks, full_sequence_must_fit=True)
    return got is not None


def test_admission_asks_for_the_bound_and_not_for_every_token(cache: Cache) -> None:
    request = cache.new_request("a", list(range(POOL * BLOCK)), block_size=BLOCK)
    assert not fits(cache, request)
    cache.group.bound("a", POOL - 1)
    assert fits(cache, request)


def test_admission_refuses_what_exceeds_the_pool_in_spite_of_its_bound(cache: Cache) -> None:
    cache.start("other")  # holds 3 of 20 blocks
    request = cache.new_request("a", list(range(200, 200 + POOL * BLOCK)), block_size=BLOCK)
    cache.group.bound("a", POOL - 3)
    assert not fits(cache, request)
    cache.group.bound("a", POOL - 4)
    assert fits(cache, request)


def test_bound_ends_with_the_request(cache: Cache) -> None:
    request = cache.new_request("a", list(range(POOL * BLOCK)), block_size=BLOCK)
    cache.group.bound("a", 4)
    cache.group.unbound("a")
    cache.group.unbound("a")
    assert not fits(cache, request)


def test_allocation_itself_is_never_capped(cache: Cache) -> None:
    cache.start("a")
    cache.group.bound("a", 4)
    cache.decode("a", 20)
    assert len(cache.table("a")) == 8


# ---- the spec


@pytest.fixture
def spec(kv_cache_config: Callable[..., Any]) -> GKVSpec:
    config = kv_cache_config(POLICY, block_size=BLOCK, num_blocks=POOL)
    return config.kv_cache_groups[0].kv_cache_spec


@pytest.mark.parametrize(
    ("protect", "reserve", "protected"),
    [("prompt", None, 4), ("prompt", 63, 16), ("prompt", 0, 0), ("sinks", 63, 1), ("none", 63, 0)],
)
def test_spec_carries_the_servers_bound(protect: str, reserve: int | None, protected: int) -> None:
    stock = FullAttentionSpec(block_size=4, num_kv_heads=2, head_size=63, dtype=torch.bfloat16)
    config = KVPolicyConfig(**POLICY, protect=protect, reserve_prompt=reserve)
    spec = GKVSpec.from_full_attention(stock, config)
    assert spec.bound is not None
    assert spec.bound.blocks(1, spec.block_size) == protected + blocks_for(24, 4)
    assert spec.page_size_bytes == stock.page_size_bytes


def test_merge_keeps_class_and_bound(spec: GKVSpec) -> None:
    merged = GKVSpec.merge([spec, copy.copy(spec)])
    assert merged == spec
    assert type(merged) is GKVSpec


def test_merge_refuses_layers_that_do_not_evict(spec: GKVSpec) -> None:
    stock = FullAttentionSpec(block_size=4, num_kv_heads=1, head_size=1, dtype=torch.float32)
    with pytest.raises(AssertionError, match="evictable and other layers mixed"):
        GKVSpec.merge([spec, stock])  # type: ignore[list-item]


def test_spec_survives_pickle_and_copy(spec: GKVSpec) -> None:
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec
    assert hash(copy.deepcopy(spec)) == hash(spec)


def test_other_block_size_keeps_class_and_settings(spec: GKVSpec) -> None:
    assert spec.copy_with_new_block_size(spec.block_size) == spec
    other = spec.copy_with_new_block_size(2)
    assert type(other) is GKVSpec
    assert other.bound == spec.bound
    # The same tokens in blocks half as large.
    assert other.bound.blocks(1, other.block_size) == 2 * spec.bound.blocks(1, spec.block_size)


def test_spec_keeps_every_field_of_the_stock_spec() -> None:
    stock = FullAttentionSpec(
        block_size=8,
        num_kv_heads=5,
        head_size=64,
        head_size_v=32,
        dtype=torch.float16,
        page_size_padded=8 * 5 * 96 * 2 + 64,
        dcp_sharded=False,
    )
    spec = GKVSpec.from_full_attention(stock, KVPolicyConfig(**POLICY))
    for name in stock.__dataclass_fields__:
        assert getattr(spec, name) == getattr(stock, name), name


def test_spec_is_no_mla_spec(spec: GKVSpec) -> None:
    assert not isinstance(spec, MLAAttentionSpec)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_memory_per_request_is_bounded(
    spec: GKVSpec, vllm_config: Callable[..., Any], asynchronous: bool
) -> None:
    config = vllm_config(POLICY, max_num_batched_tokens=63, async_scheduling=asynchronous)
    ahead = in_flight_tokens(config)
    assert ahead == (189 if asynchronous else 63)
    expected = bounded_blocks(4, 24, ahead, BLOCK) * spec.page_size_bytes
    assert spec.max_memory_usage_bytes(config) == expected
    assert expected < 128 * spec.page_size_bytes


def test_memory_of_short_requests_is_that_of_stock_vllm(
    spec: GKVSpec, vllm_config: Callable[..., Any]
) -> None:
    config = vllm_config(POLICY, max_model_len=23, max_num_batched_tokens=63)
    assert spec.max_memory_usage_bytes(config) == 6 * spec.page_size_bytes


def test_spec_without_a_bound_counts_as_stock(
    spec: GKVSpec, vllm_config: Callable[..., Any]
) -> None:
    unbound = replace(spec, bound=None)
    assert unbound.max_memory_usage_bytes(vllm_config(POLICY)) == 128 * spec.page_size_bytes
