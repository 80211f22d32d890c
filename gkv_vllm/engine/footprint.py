# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Pure functions that say how many KV blocks a request may hold; nothing here decides or frees."""

from __future__ import annotations

from gkv_vllm.config import KVPolicyConfig, RequestPolicy, blocks_for


def protected_blocks(protect: str, prompt_tokens: int, block_size: int) -> int:
    """Leading blocks of a request that are never evicted.

    `prompt`: every block that holds a prompt token; `sinks`: the first block; `none`: nothing."""
    if protect == "prompt":
        return blocks_for(prompt_tokens, block_size)
    return 1 if protect == "sinks" else 0


def due_tokens(budget: int, interval: int, block_size: int) -> int:
    """Unprotected tokens at which a request is due: budget in whole blocks, plus interval."""
    return blocks_for(budget, block_size) * block_size + interval


def bounded_blocks(protected: int, due: int, in_flight_tokens: int, block_size: int) -> int:
    """The most blocks an evicting request holds.

    One token short of being due it takes one more step, and with asynchronous scheduling two more
    before the scores of that one count: `in_flight_tokens` is what those steps compute."""
    return protected + blocks_for(due - 1 + in_flight_tokens, block_size)


def pool_problem(
    config: KVPolicyConfig, block_size: int, pool: int, kv_groups: int = 1
) -> str | None:
    """Why no request could ever be evicted from a pool of this many blocks; None if it could.

    kv_groups: KV cache groups that lose blocks, in each of which a request holds as many."""
    blocks = kv_groups * blocks_for(
        due_tokens(config.budget, config.interval, block_size), block_size
    )
    if blocks <= pool:
        return None
    where = f" in {kv_groups} KV cache groups" if kv_groups > 1 else ""
    return (
        f"kv_policy budget={config.budget} and interval={config.interval} take "
        f"{blocks} blocks of {block_size} tokens{where}, but the KV cache has "
        f"{pool}: no request would ever be evicted; lower --kv-budget or give the KV cache more "
        "memory (--num-gpu-blocks-override, if it is set)"
    )


def peak_blocks(
    policy: RequestPolicy,
    *,
    prompt_tokens: int,
    max_tokens: int,
    block_size: int,
    interval: int,
    in_flight_tokens: int,
) -> int:
    """The most blocks a request can ever hold, whether its blocks are evicted or not."""
    whole = blocks_for(prompt_tokens + max_tokens, block_size)
    if not policy.evict:
        return whole
    protected = protected_blocks(policy.protect, prompt_tokens, block_size)
    due = due_tokens(policy.budget, interval, block_size)
    return min(whole, bounded_blocks(protected, due, in_flight_tokens, block_size))


def slot_count(max_requests: int, usable_blocks: int, min_budget: int, block_size: int) -> int:
    """Slots for per-request worker state: as many as there can be requests with something to evict.

    A request takes a slot when its unprotected part outgrows its budget, so it holds at
    least `min_budget` tokens of the pool by then. (Requests that share an unprotected prefix
    can be more than this; the planner then reports them as skipped for want of a slot.)"""
    return max(1, min(max_requests, usable_blocks // max(1, min_budget // block_size)))
