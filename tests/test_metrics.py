# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Eviction counts: their way through vLLM's own messages and loggers to the Prometheus registry."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from gkv_vllm import compat, metrics
from gkv_vllm.config import KVPolicyConfig
from gkv_vllm.metrics import EvictionCounts, EvictionMetrics, EvictionStats, take

prometheus = pytest.importorskip("prometheus_client")
loggers = pytest.importorskip("vllm.v1.metrics.loggers")

from vllm.config import VllmConfig  # noqa: E402
from vllm.v1.engine import EngineCoreOutputs  # noqa: E402
from vllm.v1.metrics.stats import KV_FETCH_STAGES, SchedulerStats  # noqa: E402
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder  # noqa: E402

POLICY = {"policy": "gkv", "budget": 256, "interval": 64}
ENGINE_0 = {"model_name": "tiny", "engine": "0"}
ENGINE_1 = {"model_name": "tiny", "engine": "1"}


def busy_stats() -> EvictionStats:
    """Two evictions that leave 1,824 tokens, a slow one that leaves 63, and three skips."""
    stats = EvictionStats()
    stats.record_eviction(blocks_freed=4, tokens_evicted=128, live_tokens=1824)
    stats.record_eviction(blocks_freed=5, tokens_evicted=160, live_tokens=1824)
    stats.record_eviction(blocks_freed=1, tokens_evicted=32, live_tokens=63)
    for seconds in (532e-6, 532e-6, 0.0123):
        stats.record_seconds(seconds)
    stats.skip("no_slot")
    stats.skip("no_slot")
    stats.skip("stale")
    return stats


BUSY = {
    "gkv:evictions": 3,
    "gkv:blocks_freed": 10,
    "gkv:tokens_evicted": 320,
    "gkv:skipped=no_slot": 2,
    "gkv:skipped=stale": 1,
    "gkv:live_tokens=1824": 2,
    "gkv:live_tokens=63": 1,
    "gkv:eviction_us=532": 2,
    "gkv:eviction_us=12300": 1,
}


def stock_counts() -> dict[str, int]:
    """What vLLM's scheduler puts into the dict: every stage, 0 without a KV connector."""
    return dict.fromkeys(KV_FETCH_STAGES, 0)


def forget_our_collectors() -> None:
    for collector in set(prometheus.REGISTRY._names_to_collectors.values()):
        if getattr(collector, "_name", "").startswith("gkv:"):
            prometheus.REGISTRY.unregister(collector)


@pytest.fixture
def installable():
    """Whatever a test installs is gone after it, from vLLM and from the global registry."""
    targets = (compat.MANAGER_INIT, compat.RECORD)
    for target in targets:
        compat.unwrap(target)
    forget_our_collectors()
    yield
    for target in targets:
        compat.unwrap(target)
    forget_our_collectors()


def engine_config(policy: dict | None = POLICY, max_model_len: int = 4096) -> VllmConfig:
    config = VllmConfig(additional_config={} if policy is None else {"kv_policy": policy})
    config.model_config = SimpleNamespace(
        served_model_name="tiny", max_model_len=max_model_len, is_diffusion=False
    )
    return config


def manager_of(config: VllmConfig, engines: list[int] | None = None, **kwargs):
    """A real StatLoggerManager with our wrap installed."""
    metrics.install(config)
    return loggers.StatLoggerManager(config, engines or [0], **kwargs)


def value(name: str, labels: dict[str, str] = ENGINE_0, **more: str) -> float | None:
    return prometheus.REGISTRY.get_sample_value(name, {**labels, **more})


# ---- the engine's side


def test_drain_gives_each_count_once():
    stats = busy_stats()
    assert stats.drain() == BUSY
    assert stats.drain() == {}
    stats.skip("stale")
    assert stats.drain() == {"gkv:skipped=stale": 1}


def test_totals_survive_drain_and_log_line():
    stats = busy_stats()
    stats.drain()
    stats.log_line()
    stats.record_eviction(blocks_freed=1, tokens_evicted=32, live_tokens=63)
    stats.record_seconds(0.0)
    assert (stats.evictions, stats.blocks_freed, stats.tokens_evicted) == (4, 11, 352)
    assert stats.skipped == {"no_slot": 2, "stale": 1}
    assert stats.live_tokens == {1824: 2, 63: 2}


def test_log_line_speaks_of_the_period_since_the_last_one():
    stats = busy_stats()
    stats.drain()
    assert stats.log_line() == (
        "KV eviction: 3 evictions, 10 blocks freed, 320 tokens evicted, 1237 live tokens per "
        "request, 4.45 ms per eviction, skipped: no_slot=2 stale=1"
    )
    assert stats.log_line() is None
    stats.skip("opted_out")
    assert stats.log_line() == "KV eviction: skipped: opted_out=1"


def test_take_undoes_encode_and_leaves_the_stages():
    counts = stock_counts() | BUSY
    assert take(counts) == EvictionCounts(
        evictions=3,
        blocks_freed=10,
        tokens_evicted=320,
        skipped=Counter(no_slot=2, stale=1),
        live_tokens=Counter({1824: 2, 63: 1}),
        eviction_us=Counter({532: 2, 12300: 1}),
    )
    assert counts == stock_counts()
    assert take(counts) is None


def test_take_removes_names_of_another_version_uncounted():
    counts = {"gkv:from_the_future=7": 1}
    assert take(counts) == EvictionCounts()
    assert counts == {}


def test_importing_metrics_imports_neither_vllm_nor_torch_nor_prometheus():
    code = (
        "import sys, gkv_vllm.metrics;"
        "print([m for m in ('vllm', 'torch', 'prometheus_client') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_skip_in_the_source_has_a_documented_reason():
    package = Path(metrics.__file__).parent
    used = {
        reason
        for file in package.rglob("*.py")
        for reason in re.findall(r'\.skip\(\s*"(\w+)"', file.read_text())
    }
    assert used <= set(metrics.SKIP_REASONS)


# ---- the transport


def test_counts_survive_the_way_from_engine_core_to_api_server():
    sent = SchedulerStats(num_running_reqs=7, num_kv_fetch_reqs_by_stage=stock_counts())
    sent.num_kv_fetch_reqs_by_stage.update(busy_stats().drain())
    frames = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=sent))
    received = MsgpackDecoder(EngineCoreOutputs).decode(frames).scheduler_stats
    assert received.num_running_reqs == 7
    assert take(received.num_kv_fetch_reqs_by_stage) == take(dict(BUSY))
    assert received.num_kv_fetch_reqs_by_stage == stock_counts()


# ---- the front end


def test_metrics_show_what_the_engine_counted(installable):
    manager = manager_of(engine_config())
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage=stock_counts() | BUSY)
    manager.record(scheduler_stats=stats, iteration_stats=None)
    assert value("gkv:evictions_total") == 3
    assert value("gkv:blocks_freed_total") == 10
    assert value("gkv:tokens_evicted_total") == 320
    assert value("gkv:skipped_total", reason="no_slot") == 2
    assert value("gkv:skipped_total", reason="stale") == 1
    assert value("gkv:request_live_tokens_count") == 3
    assert value("gkv:request_live_tokens_sum") == 2 * 1824 + 63
    assert value("gkv:request_live_tokens_bucket", le="100.0") == 1
    assert value("gkv:request_live_tokens_bucket", le="2000.0") == 3
    assert value("gkv:eviction_seconds_count") == 3
    assert value("gkv:eviction_seconds_sum") == pytest.approx(2 * 532e-6 + 0.0123)
    assert value("gkv:eviction_seconds_bucket", le="0.001") == 2


def test_exposition_has_the_promised_names(installable):
    manager_of(engine_config())
    text = prometheus.generate_latest().decode()
    for line in (
        'gkv:evictions_total{engine="0",model_name="tiny"} 0.0',
        'gkv:skipped_total{engine="0",model_name="tiny",reason="no_slot"} 0.0',
        'gkv:policy_info{budget="256",engine="0",granularity="token",interval="64",'
        'layer_groups="1",model_name="tiny",policy="gkv",protect="prompt",scope="head",'
        'trigger="interval",window="16"} 1.0',
    ):
        assert line in text.splitlines()


def test_every_series_is_zero_from_the_start_for_every_engine(installable):
    manager_of(engine_config(), [0, 1])
    for engine in (ENGINE_0, ENGINE_1):
        for name in ("evictions", "blocks_freed", "tokens_evicted"):
            assert value(f"gkv:{name}_total", engine) == 0
        for reason in metrics.SKIP_REASONS:
            assert value("gkv:skipped_total", engine, reason=reason) == 0
        assert value("gkv:request_live_tokens_count", engine) == 0
        assert value("gkv:eviction_seconds_count", engine) == 0


def test_each_engine_has_its_own_series(installable):
    manager = manager_of(engine_config(), [0, 1])
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage={"gkv:evictions": 5})
    manager.record(stats, None, engine_idx=1)
    assert value("gkv:evictions_total", ENGINE_1) == 5
    assert value("gkv:evictions_total", ENGINE_0) == 0


def test_labels_are_those_of_vllm(installable):
    manager_of(engine_config())
    ours = {"model_name", "engine"}
    stock = prometheus.REGISTRY._names_to_collectors["vllm:num_requests_running"]
    assert set(stock._labelnames) == ours
    theirs = prometheus.REGISTRY.get_sample_value("vllm:num_requests_running", ENGINE_0)
    assert theirs is not None, "vLLM's label values differ from those we use"
    assert value("gkv:evictions_total") is not None


@pytest.fixture
def vllm_log(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.DEBUG, logger="vllm")
    return caplog


@pytest.mark.parametrize("aggregate", [False, True], ids=["per_engine", "aggregated"])
def test_stock_log_line_has_no_kv_fetch_part(installable, vllm_log, aggregate):
    manager = manager_of(engine_config(), aggregate_engine_logging=aggregate)
    stats = SchedulerStats(num_running_reqs=3, num_kv_fetch_reqs_by_stage=stock_counts() | BUSY)
    manager.record(stats, None)
    manager.log()
    assert "Running: 3 reqs" in vllm_log.text
    assert "KV fetch" not in vllm_log.text


def test_stock_gauges_are_unchanged(installable):
    counts = dict(zip(KV_FETCH_STAGES, (1, 2, 3), strict=True))
    stats = SchedulerStats(num_running_reqs=3, num_waiting_reqs=2, kv_cache_usage=0.5)
    stats.num_kv_fetch_reqs_by_stage = counts | BUSY
    manager_of(engine_config()).record(stats, None)
    assert value("vllm:num_requests_running") == 3
    assert value("vllm:num_requests_waiting") == 2
    assert value("vllm:kv_cache_usage_perc") == 0.5
    assert stats.num_kv_fetch_reqs_by_stage == counts


def test_stats_without_our_keys_change_nothing(installable, monkeypatch):
    manager = manager_of(engine_config())
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage=stock_counts())
    seen = []
    monkeypatch.setattr(
        manager, "stat_loggers", [SimpleNamespace(record=lambda *a, **k: seen.append((a, k)))]
    )
    monkeypatch.setattr(manager.gkv_metrics, "record", lambda *a: pytest.fail("nothing to record"))
    manager.record(stats, "iteration", mm_cache_stats="mm", engine_idx=0)
    manager.record(None, None)
    assert seen == [
        ((stats, "iteration"), {"mm_cache_stats": "mm", "engine_idx": 0}),
        ((None, None), {"mm_cache_stats": None, "engine_idx": 0}),
    ]
    assert stats.num_kv_fetch_reqs_by_stage == stock_counts()


@pytest.mark.parametrize("policy", [None, {"policy": "none"}], ids=["absent", "none"])
def test_install_without_a_policy_leaves_vllm_alone(installable, policy):
    manager = manager_of(engine_config(policy))
    assert not compat.wrapped(compat.MANAGER_INIT)
    assert not compat.wrapped(compat.RECORD)
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage=stock_counts())
    manager.record(stats, None)
    assert "gkv:" not in prometheus.generate_latest().decode()


def test_a_manager_without_policy_is_stock_after_another_had_one(installable):
    metrics.install(engine_config())
    manager = loggers.StatLoggerManager(engine_config(None))
    manager.record(SchedulerStats(num_kv_fetch_reqs_by_stage=stock_counts()), None)
    assert "gkv:" not in prometheus.generate_latest().decode()


def test_installing_twice_counts_once(installable):
    config = engine_config()
    metrics.install(config)
    once = loggers.StatLoggerManager.record
    manager = manager_of(config)
    assert loggers.StatLoggerManager.record is once
    manager.record(SchedulerStats(num_kv_fetch_reqs_by_stage=dict(BUSY)), None)
    assert value("gkv:evictions_total") == 3


def test_a_second_front_end_goes_on_counting(installable):
    for _ in range(2):
        manager = manager_of(engine_config())
        manager.record(SchedulerStats(num_kv_fetch_reqs_by_stage=dict(BUSY)), None)
    assert value("gkv:evictions_total") == 6
    assert value("gkv:request_live_tokens_count") == 6


def test_a_second_front_end_shows_its_own_settings_and_buckets(installable):
    manager_of(engine_config())
    manager_of(engine_config(POLICY | {"budget": 512}, max_model_len=20000))
    text = prometheus.generate_latest().decode()
    info = [line for line in text.splitlines() if line.startswith("gkv:policy_info{")]
    assert len(info) == 1
    assert 'budget="512"' in info[0]
    assert value("gkv:request_live_tokens_bucket", le="20000.0") == 0


def test_buckets_reach_up_to_the_model_length():
    registry = prometheus.CollectorRegistry()
    EvictionMetrics(KVPolicyConfig(policy="gkv"), "tiny", 63, [0], registry)
    buckets = [
        sample.labels["le"]
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "gkv:request_live_tokens_bucket"
    ]
    assert buckets == ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "+Inf"]


# ---- several API servers

API_SERVER = """
import json, sys
from gkv_vllm.config import KVPolicyConfig
from gkv_vllm.metrics import EvictionMetrics, take
for _ in range(2):  # building twice, as elastic scaling does, must not count twice
    front_end = EvictionMetrics(KVPolicyConfig(policy="gkv"), "tiny", 4096, [0])
front_end.record(take(json.loads(sys.argv[1])))
"""


def test_several_api_servers_sum_to_the_truth(tmp_path):
    from prometheus_client.multiprocess import MultiProcessCollector

    for counts in (BUSY, {"gkv:evictions": 4, "gkv:live_tokens=63": 4, "gkv:skipped=stale": 1}):
        done = subprocess.run(
            [sys.executable, "-c", API_SERVER, json.dumps(counts)],
            env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "not been implemented" not in done.stderr  # prometheus_client's warning
    registry = prometheus.CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))

    def total(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {**ENGINE_0, **labels})

    assert len(list(tmp_path.glob("counter_*.db"))) == 2, "two processes must have written"
    assert total("gkv:evictions_total") == 7
    assert total("gkv:blocks_freed_total") == 10
    assert total("gkv:skipped_total", reason="stale") == 2
    assert total("gkv:skipped_total", reason="opted_out") == 0
    assert total("gkv:request_live_tokens_count") == 7
    assert total("gkv:request_live_tokens_bucket", le="100.0") == 5
    assert total("gkv:eviction_seconds_sum") == pytest.approx(2 * 532e-6 + 0.0123)
    settings = {
        name: str(getattr(KVPolicyConfig(policy="gkv"), name)) for name in metrics.INFO_SETTINGS
    }
    assert total("gkv:policy_info", **settings) == 1
