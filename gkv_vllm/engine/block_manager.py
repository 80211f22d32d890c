# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Frees and repurposes blocks of running requests; keeps vLLM's accounting, chooses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from gkv_vllm.engine.spec import GKVSpec


class GKVBlockManager(FullAttentionManager):
    """vLLM's manager for full attention, with holes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._admission_blocks: dict[str, int] = {}
        self._exact_tokens: dict[str, int] = {}

    @property
    def layer_group(self) -> int:
        """Which of the policy's layer groups these layers belong to."""
        return self.kv_cache_spec.layer_group

    def bound(self, request_id: str, blocks: int) -> None:
        """Admit this request as one that never holds more than `blocks` blocks."""
        self._admission_blocks[request_id] = blocks

    def unbound(self, request_id: str) -> None:
        """The request has left the engine."""
        self._admission_blocks.pop(request_id, None)

    def evict(self, request_id: str, blocks: Sequence[int], exact_tokens: int) -> int:
        """Return these logical blocks of a running request to the pool, leaving holes.

        Safe while no step that is scheduled later writes them: whoever gets such a block writes
        it in a later step, and steps run in order. Evicting a hole does nothing.
        `exact_tokens`: how many leading tokens are computed, or scheduled, with the full context;
        of the rest nothing enters the prefix cache, as it saw a reduced context.
        Returns how many blocks became free (a shared block only loses one reference)."""
        held = self.req_to_blocks[request_id]
        leaving = [held[index] for index in blocks if not held[index].is_null]
        for index in blocks:
            held[index] = self._null_block
        self._exact_tokens.setdefault(request_id, exact_tokens)
        # As vLLM does, the tail first: a cached block is of use only behind its predecessors.
        self.block_pool.free_blocks(reversed(leaving))
        return sum(block.ref_cnt == 0 for block in leaving)

    def private(self, request_id: str, blocks: Sequence[int]) -> list[bool]:
        """Which of these logical blocks nobody else refers to, so that they may be written."""
        held = self.req_to_blocks[request_id]
        return [held[index].ref_cnt == 1 for index in blocks]

    def repurpose(
        self, request_id: str, targets: Sequence[int], fresh: Sequence[int], exact_tokens: int
    ) -> dict[int, int]:
        """These logical blocks of a running request will hold other tokens than their own.

        They leave the prefix cache, since their content will not be what their hash says; those of
        `fresh` give up their shared block for a new one (the caller has checked that there are
        enough). `exact_tokens` as for `evict`; nothing from the first target on is cached any more.
        Returns fresh logical block -> new block id."""
        held = self.req_to_blocks[request_id]
        shared = [held[index] for index in fresh]
        for index, block in zip(fresh, self.block_pool.get_new_blocks(len(fresh)), strict=True):
            held[index] = block
        self.block_pool.evict_blocks({held[index].block_id for index in targets})
        exact = min([exact_tokens, *(index * self.block_size for index in targets)])
        self._exact_tokens[request_id] = min(exact, self._exact_tokens.get(request_id, exact))
        self.block_pool.free_blocks(shared)
        return {index: held[index].block_id for index in fresh}

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """As vLLM's, but the admission gate asks for the bounded footprint, not for every token."""
        if kwargs.get("apply_admission_cap") and request_id in self._admission_blocks:
            num_tokens = min(num_tokens, self._admission_blocks[request_id] * self.block_size)
        return super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, up to the point where the request first lost a block."""
        exact = self._exact_tokens.get(request.request_id)
        if exact is not None:
            num_tokens = min(num_tokens, exact)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's; the request may come back after a preemption, with an exact context again."""
        self._exact_tokens.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


def register_spec() -> None:
    """Tell vLLM which manager serves GKVSpec. Idempotent.

    vLLM fills its registry lazily and only while it is empty: without the first call ours would be
    the only entry."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(GKVSpec, GKVBlockManager, uniform_type_base_spec=FullAttentionSpec)
