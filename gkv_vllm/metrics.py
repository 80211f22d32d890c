# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Counts evictions in the engine core and shows them on `/metrics`; it decides nothing.

The way from one to the other: evictions happen in the engine core, `/metrics` is answered by the
API server, and vLLM sends a `SchedulerStats` between the two after every step. msgpack drops
attributes that its dataclass does not declare, and `kv_connector_stats` needs a connector. What
passes is `num_kv_fetch_reqs_by_stage: dict[str, int]`: the scheduler adds what
`EvictionStats.drain` returns, under keys that begin with `gkv:`, and `install` makes every
`StatLoggerManager` take them out before vLLM's own loggers see them (which would print a "KV fetch"
part otherwise). One API server receives each message, so the counts of several servers sum to the
truth in Prometheus' multiprocess mode. Remove the detour when vLLM lets plugins carry scheduler
stats.

Without statistics (`--disable-log-stats`) vLLM sends none, and `/metrics` has no `gkv:` lines.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from gkv_vllm import compat
from gkv_vllm.config import KVPolicyConfig

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_C = TypeVar("_C")

PREFIX = "gkv:"
SKIP_REASONS = {
    "no_candidates": "a request was due, but every unprotected block lies in the budget or window",
    "no_free_block": "survivors need a block of their own in place of a shared one; none was free",
    "no_slot": "a step whose queries were not recorded because all query rings are taken",
    "opted_out": "a request that asked for kv_policy=none",
    "stale": "scores of a request that has finished or was preempted since",
}
"""Why an eviction did not happen; every reason shows as 0 from the start."""

INFO_SETTINGS = (
    "policy",
    "budget",
    "interval",
    "window",
    "granularity",
    "scope",
    "layer_groups",
    "protect",
    "trigger",
)
SECONDS_BUCKETS = tuple(m * 10.0**e for e in range(-5, 1) for m in (1, 2, 5))
"""10 microseconds (ranking a few blocks) to 5 seconds."""

_SUMS = ("evictions", "blocks_freed", "tokens_evicted")
_DISTRIBUTIONS = {"skipped": str, "live_tokens": int, "eviction_us": int}


@dataclass
class EvictionCounts:
    """What happened in some period: three sums and three distributions (value -> how often)."""

    evictions: int = 0
    blocks_freed: int = 0
    tokens_evicted: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    live_tokens: Counter[int] = field(default_factory=Counter)
    """Live KV tokens of a request right after one of its evictions."""
    eviction_us: Counter[int] = field(default_factory=Counter)
    """Microseconds of scoring, and of moving tokens, per eviction."""

    def record_eviction(self, blocks_freed: int, tokens_evicted: int, live_tokens: int) -> None:
        """Count one eviction of one request."""
        self.evictions += 1
        self.blocks_freed += blocks_freed
        self.tokens_evicted += tokens_evicted
        self.live_tokens[live_tokens] += 1

    def record_seconds(self, seconds: float) -> None:
        """Count what the worker spent on one eviction: scoring, and moving tokens."""
        self.eviction_us[round(seconds * 1e6)] += 1

    def skip(self, reason: str) -> None:
        """Count an eviction that did not happen; `reason` is a key of `SKIP_REASONS`."""
        self.skipped[reason] += 1

    def encode(self) -> dict[str, int]:
        """As flat counts, such as `gkv:blocks_freed`: 12, `gkv:live_tokens=1824`: 3; no zeros."""
        flat = {f"{PREFIX}{name}": getattr(self, name) for name in _SUMS}
        for name in _DISTRIBUTIONS:
            for value, times in getattr(self, name).items():
                flat[f"{PREFIX}{name}={value}"] = times
        return {key: count for key, count in flat.items() if count}


@dataclass
class EvictionStats(EvictionCounts):
    """The engine's totals since it started, and what was not yet sent or logged.

    The totals are bounded by how many distinct values occur, not by uptime."""

    _unsent: EvictionCounts = field(default_factory=EvictionCounts, repr=False)
    _unlogged: EvictionCounts = field(default_factory=EvictionCounts, repr=False)

    def record_eviction(self, blocks_freed: int, tokens_evicted: int, live_tokens: int) -> None:
        super().record_eviction(blocks_freed, tokens_evicted, live_tokens)
        for counts in (self._unsent, self._unlogged):
            counts.record_eviction(blocks_freed, tokens_evicted, live_tokens)

    def record_seconds(self, seconds: float) -> None:
        super().record_seconds(seconds)
        for counts in (self._unsent, self._unlogged):
            counts.record_seconds(seconds)

    def skip(self, reason: str) -> None:
        super().skip(reason)
        for counts in (self._unsent, self._unlogged):
            counts.skip(reason)

    def drain(self) -> dict[str, int]:
        """The counts since the last call, encoded for the way to the front end; mostly empty."""
        flat = self._unsent.encode()
        if flat:
            self._unsent = EvictionCounts()
        return flat

    def log_line(self) -> str | None:
        """One sentence about the time since the last call, None when nothing happened."""
        counts, self._unlogged = self._unlogged, EvictionCounts()
        parts = []
        if counts.evictions:
            parts += [
                f"{counts.evictions} evictions",
                f"{counts.blocks_freed} blocks freed",
                f"{counts.tokens_evicted} tokens evicted",
                f"{_mean(counts.live_tokens):.0f} live tokens per request",
            ]
        if counts.eviction_us:
            parts.append(f"{_mean(counts.eviction_us) / 1000:.2f} ms per eviction")
        if counts.skipped:
            reasons = sorted(counts.skipped.items())
            parts.append("skipped: " + " ".join(f"{reason}={n}" for reason, n in reasons))
        return "KV eviction: " + ", ".join(parts) if parts else None


def _mean(distribution: Counter[int]) -> float:
    return sum(value * times for value, times in distribution.items()) / distribution.total()


def take(stage_counts: dict[str, int]) -> EvictionCounts | None:
    """Remove our keys from vLLM's `num_kv_fetch_reqs_by_stage`; None when there are none.

    Whatever begins with `gkv:` is removed; names that this version does not know go uncounted."""
    ours = [key for key in stage_counts if key.startswith(PREFIX)]
    if not ours:
        return None
    counts = EvictionCounts()
    for key in ours:
        times = stage_counts.pop(key)
        name, _, value = key.removeprefix(PREFIX).partition("=")
        if name in _SUMS:
            setattr(counts, name, getattr(counts, name) + times)
        elif name in _DISTRIBUTIONS:
            getattr(counts, name)[_DISTRIBUTIONS[name](value)] += times
    return counts


class EvictionMetrics:
    """The Prometheus metrics of one front end, labelled as vLLM labels its own.

    Collectors live as long as the process: a second front end in it goes on counting where the
    first stopped (vLLM itself unregisters `vllm:*` only)."""

    def __init__(
        self,
        config: KVPolicyConfig,
        model_name: str,
        max_model_len: int,
        engine_indexes: Iterable[int],
        registry: CollectorRegistry | None = None,
    ) -> None:
        # Here and not on top: the engine core and the planner's tests need no prometheus_client,
        # which settles on its multiprocess mode when it is first imported.
        import prometheus_client as prometheus
        from vllm.v1.metrics.buckets import build_1_2_5_buckets

        registry = registry or prometheus.REGISTRY

        def collector(kind: type[_C], name: str, doc: str, *more: str, **options: Any) -> _C:
            labels = ["model_name", "engine", *more]
            return _collector(registry, kind, name, doc, labels, **options)

        self.model_name = model_name
        self.evictions = collector(
            prometheus.Counter, "gkv:evictions", "Evictions: times that a request lost blocks."
        )
        self.blocks_freed = collector(
            prometheus.Counter, "gkv:blocks_freed", "KV blocks that running requests gave up."
        )
        self.tokens_evicted = collector(
            prometheus.Counter, "gkv:tokens_evicted", "Tokens whose keys and values were evicted."
        )
        self.skipped = collector(
            prometheus.Counter, "gkv:skipped", "Evictions that did not happen, by reason.", "reason"
        )
        self.live_tokens = collector(
            prometheus.Histogram,
            "gkv:request_live_tokens",
            "Live KV tokens of a request right after an eviction.",
            buckets=build_1_2_5_buckets(max_model_len),
        )
        self.seconds = collector(
            prometheus.Histogram,
            "gkv:eviction_seconds",
            "Seconds of scoring and moving tokens per eviction; on a GPU those of the device.",
            buckets=SECONDS_BUCKETS,
        )
        self.policy_info = collector(
            prometheus.Gauge,
            "gkv:policy_info",
            "The settings of the KV policy; always 1.",
            *INFO_SETTINGS,
            multiprocess_mode="mostrecent",
        )
        self._show(config, engine_indexes)

    def _show(self, config: KVPolicyConfig, engine_indexes: Iterable[int]) -> None:
        """Make every series visible, at 0, before anything happens."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:  # label sets cannot be removed there
            self.policy_info.clear()
        settings = [str(getattr(config, name)) for name in INFO_SETTINGS]
        for engine in engine_indexes:
            self.policy_info.labels(self.model_name, str(engine), *settings).set(1)
            nothing = EvictionCounts(skipped=Counter(dict.fromkeys(SKIP_REASONS, 0)))
            self.record(nothing, engine)

    def record(self, counts: EvictionCounts, engine_index: int = 0) -> None:
        """Add what one engine reported."""
        labels = (self.model_name, str(engine_index))
        self.evictions.labels(*labels).inc(counts.evictions)
        self.blocks_freed.labels(*labels).inc(counts.blocks_freed)
        self.tokens_evicted.labels(*labels).inc(counts.tokens_evicted)
        for reason, times in counts.skipped.items():
            self.skipped.labels(*labels, reason).inc(times)
        live_tokens, seconds = self.live_tokens.labels(*labels), self.seconds.labels(*labels)
        for tokens in counts.live_tokens.elements():
            live_tokens.observe(tokens)
        for microseconds in counts.eviction_us.elements():
            seconds.observe(microseconds / 1e6)


def _collector(
    registry: Any, kind: type[_C], name: str, doc: str, labels: list[str], **options: Any
) -> _C:
    """The registered collector of that name, made when there is none or its buckets differ."""
    existing = registry._names_to_collectors.get(name)
    buckets = options.get("buckets")
    if existing is not None and buckets and list(existing._kwargs["buckets"]) != list(buckets):
        registry.unregister(existing)
        existing = None
    return existing or kind(name, doc, labels, registry=registry, **options)  # type: ignore[call-arg]


def install(vllm_config: Any) -> None:
    """Make every `StatLoggerManager` built from now on in this process show our metrics.

    Does nothing without a policy, and nothing the second time. A manager whose own config has no
    policy behaves as stock. Call it before the engine client is built."""
    if _policy(vllm_config).active:
        compat.wrap(compat.MANAGER_INIT, _around_init)
        compat.wrap(compat.RECORD, _around_record)


def _policy(vllm_config: Any) -> KVPolicyConfig:
    extra = vllm_config.additional_config
    return KVPolicyConfig.from_mapping(
        extra.get("kv_policy") if isinstance(extra, Mapping) else None
    )


def _around_init(original: Callable[..., None]) -> Callable[..., None]:
    def init(manager: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(manager, vllm_config, *args, **kwargs)
        config, model = _policy(vllm_config), vllm_config.model_config
        if config.active:
            manager.gkv_metrics = EvictionMetrics(
                config, model.served_model_name, model.max_model_len, manager.engine_indexes
            )

    return init


def _around_record(original: Callable[..., None]) -> Callable[..., None]:
    def record(
        manager: Any,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> None:
        metrics = getattr(manager, "gkv_metrics", None)
        if metrics is not None and scheduler_stats is not None:
            counts = take(scheduler_stats.num_kv_fetch_reqs_by_stage)
            if counts is not None:
                metrics.record(counts, engine_idx or 0)
        original(manager, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    return record
