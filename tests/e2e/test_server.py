# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""A live `vllm serve --kv-policy gkv`, used as users do: over HTTP, many at once, some rude."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gkv_vllm.serving import Server, ServerFailed, serve

from .harness import prompt

pytestmark = pytest.mark.e2e

BLOCKS = 160
ENGINE = [
    *("--max-model-len", "2048", "--block-size", "32", "--max-num-seqs", "64"),
    *("--num-gpu-blocks-override", str(BLOCKS), "--enforce-eager", "--dtype", "float32"),
]
POLICY = ["--kv-policy", "gkv", "--kv-budget", "128", "--kv-interval", "32"]
BOUNDS = ["--kv-max-budget", "512", "--kv-min-budget", "64"]


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "serve.log"
    with serve(demo_model, *ENGINE, *POLICY, *BOUNDS, "--served-model-name", "demo", log=log) as up:
        yield up


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.api_url, api_key="none", max_retries=0, timeout=300)


def complete(client: Any, tokens: int, *, seed: int = 0, length: int = 40, **kv: Any) -> Any:
    return client.completions.create(
        model="demo",
        prompt=prompt(seed, length),
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": kv},
    )


def settled(server: Server) -> Any:
    """Metrics once nothing runs any more."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        metrics = server.metrics()
        if not metrics.value("vllm:num_requests_running"):
            return metrics
        time.sleep(0.2)
    raise AssertionError("requests still run")


def test_one_long_answer_is_evicted_and_the_metrics_prove_it(
    server: Server, client: openai.OpenAI
) -> None:
    before = server.metrics()
    answer = complete(client, 600)
    assert answer.usage.completion_tokens == 600
    after = settled(server)

    def grown(name: str) -> float:
        return after.value(name) - before.value(name)

    # 640 tokens, at most 192 unprotected ones: every interval of 32 tokens ends with one block.
    assert grown("gkv:evictions_total") >= 10
    assert grown("gkv:blocks_freed_total") == grown("gkv:tokens_evicted_total") / 32
    assert grown("gkv:request_live_tokens_count") == grown("gkv:evictions_total")
    live = grown("gkv:request_live_tokens_sum") / grown("gkv:request_live_tokens_count")
    assert live <= 64 + 128
    assert grown("gkv:eviction_seconds_count") == grown("gkv:evictions_total")
    labels = {"model_name": "demo", "engine": "0", "policy": "gkv", "budget": "128"}
    assert after.value("gkv:policy_info", **labels) == 1
    assert after.value("vllm:kv_cache_usage_perc") == 0


def test_a_request_that_opted_out_keeps_every_block(server: Server, client: openai.OpenAI) -> None:
    before = server.metrics()
    complete(client, 300, seed=1, kv_policy="none")
    after = settled(server)
    assert after.value("gkv:evictions_total") == before.value("gkv:evictions_total")
    opted_out = {"reason": "opted_out"}
    assert after.value("gkv:skipped_total", **opted_out) == 1 + before.get(
        "gkv:skipped_total", **opted_out
    )


async def _crowd(server: Server) -> list[int | None]:
    """60 requests that want four times the pool; every sixth hangs up in mid-stream."""
    async with openai.AsyncOpenAI(
        base_url=server.api_url, api_key="none", max_retries=0, timeout=600
    ) as client:

        async def one(index: int) -> int | None:
            stream = await client.completions.create(
                model="demo",
                prompt=prompt(index % 7, 50 + index),
                max_tokens=400,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True, "vllm_xargs": _arguments(index)},
            )
            count = 0
            async for chunk in stream:
                count += bool(chunk.choices)
                if index % 6 == 5 and count > 40:
                    await stream.close()
                    return None
                if chunk.usage:
                    return chunk.usage.completion_tokens
            return -1

        return await asyncio.gather(*(one(index) for index in range(60)))


def _arguments(index: int) -> dict[str, Any]:
    return [{}, {"kv_budget": 64}, {"kv_protect": "none"}, {"kv_policy": "none"}][index % 4]


def test_four_times_the_pool_with_clients_that_hang_up(server: Server) -> None:
    before = server.metrics()
    lengths = asyncio.run(_crowd(server))
    assert [n for i, n in enumerate(lengths) if i % 6 != 5] == [400] * 50
    after = settled(server)
    assert after.value("gkv:evictions_total") > before.value("gkv:evictions_total") + 200
    assert after.value("vllm:kv_cache_usage_perc") == 0
    assert server.process.poll() is None


BAD = {
    "unknown key": ({"kv_bugdet": 512}, "kv_budget"),
    "policy of another server": ({"kv_policy": "recency"}, "gkv"),
    "text for a number": ({"kv_budget": "512"}, "whole number"),
    "fraction": ({"kv_budget": 128.5}, "whole number"),
    "below the server's bound": ({"kv_budget": 8}, "64"),
    "above the server's bound": ({"kv_budget": 4096}, "512"),
    "unknown protection": ({"kv_protect": "system"}, "sinks"),
    "list": ({"kv_budget": [128]}, "whole number"),
    "a record that nobody would write": ({"kv_record": 1}, "--kv-record-positions"),
}
ROUTES = {
    "completions": {"prompt": [1, 2, 3], "max_tokens": 4},
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "responses": {"input": "hi", "max_output_tokens": 4},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_http_400_with_a_sentence(
    server: Server, name: str, route: str, stream: bool
) -> None:
    arguments, hint = BAD[name]
    body = {"model": "demo", "vllm_xargs": arguments, "stream": stream, **ROUTES[route]}
    response = httpx.post(f"{server.api_url}/{route}", json=body, timeout=60, trust_env=False)
    assert response.status_code == 400, response.text
    assert hint in response.json()["error"]["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_good_values_are_accepted_on_every_route(server: Server, route: str) -> None:
    arguments = {"kv_policy": "gkv", "kv_budget": 256, "kv_protect": "sinks"}
    body = {"model": "demo", "vllm_xargs": arguments, **ROUTES[route]}
    response = httpx.post(f"{server.api_url}/{route}", json=body, timeout=60, trust_env=False)
    assert response.status_code == 200, response.text


def test_the_log_states_the_bound_and_what_was_evicted(
    server: Server, client: openai.OpenAI
) -> None:
    deadline = time.monotonic() + 60
    while "evictions" not in server.log.read_text() and time.monotonic() < deadline:
        complete(client, 400, seed=3)
    log = server.log.read_text()
    assert "KV policy gkv: a decoding request holds at most" in log
    # 4 layers x 16 queries of 8 heads of 32 numbers of 4 bytes; a number per layer and KV head.
    assert "query rings and block history take 64.0 KiB per request" in log
    assert "scores of tokens take 1.56 % of the KV cache, 32 bytes per token" in log
    assert "evictions" in log
    assert "KV fetch" not in log


def test_several_api_servers_share_the_metrics(demo_model: Path, tmp_path: Path) -> None:
    arguments = [*ENGINE, *POLICY, "--served-model-name", "demo", "--api-server-count", "2"]
    with serve(demo_model, *arguments, log=tmp_path / "serve.log") as server:
        client = openai.OpenAI(base_url=server.api_url, api_key="none", timeout=300)
        for seed in range(4):
            complete(client, 300, seed=seed)
        metrics = settled(server)
        # Four requests of 340 tokens lose at least four blocks each, whichever server answered.
        assert metrics.value("gkv:evictions_total") >= 16
        assert metrics.value("gkv:policy_info", policy="gkv") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kv-policy", "gvk"], "did you mean 'gkv'"),
        (["--kv-policy", "gkv", "--kv-window", "64", "--kv-budget", "32"], "window=64"),
        (["--kv-policy", "gkv", "--pipeline-parallel-size", "2"], "pipeline"),
    ],
    ids=["unknown policy", "window over budget", "pipeline parallel"],
)
def test_a_start_that_cannot_work_ends_with_a_sentence(
    demo_model: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    log = tmp_path / "serve.log"
    with pytest.raises(ServerFailed), serve(demo_model, *ENGINE, *arguments, log=log):
        pass
    lines = [line for line in log.read_text().splitlines() if line.startswith("gkv_vllm: error:")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert "Traceback" not in log.read_text()
