# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Model Runner V2 evicts what V1 evicts, in Triton's interpreter (see tests/triton_cpu).

So do our kernels, over the caches and the batches of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from gkv_vllm.serving import serve

from .harness import BLOCK_SIZE, prompt, request
from .recorded import RUNNERS, Batch, record

pytestmark = pytest.mark.e2e

NUM_BLOCKS = 160
POLICY = {"policy": "gkv", "budget": 1024, "min_budget": 64, "interval": 32, "window": 16}
FORMS = {
    "block": {"granularity": "block"},
    "token": {"granularity": "token"},
    "attention mass in two layer groups": {
        "policy": "h2o",
        "granularity": "block",
        "layer_groups": 2,
    },
}
SHARED_BLOCKS = 6
SHARED = prompt(7, SHARED_BLOCKS * BLOCK_SIZE)
SHARER = request(SHARED + prompt(70, 9), 25)


def unprotected(seed: int, length: int, tokens: int, budget: int = 64) -> dict[str, Any]:
    """A request that is due every 32 tokens, from the first chunk of its prompt on."""
    return request(prompt(seed, length), tokens, kv_budget=budget, kv_protect="none")


def batches(groups: int = 1) -> dict[str, Batch]:
    """What every engine runs; `groups` KV cache groups take blocks of one pool."""
    chunked_and_shared = [request(prompt(3, 90) + prompt(i, 20 + 130 * i), 12) for i in range(4)]
    evicting_sharer = request(SHARED + prompt(72, 3), 70, kv_budget=96, kv_protect="none")
    opted_out = [request(prompt(60 + i, 64), 80, kv_policy="none") for i in range(2)]
    return {
        "nothing is due": Batch([*chunked_and_shared, chunked_and_shared[0]]),
        "all evict": Batch(
            [
                request(prompt(1, 40), 125, kv_budget=64),
                unprotected(2, 150, 70),
                unprotected(3, 333, 60, budget=96),
            ]
        ),
        "shared prefix": Batch(
            [evicting_sharer, SHARER], first=[request(SHARED + prompt(71, 5), 1)]
        ),
        "sharer alone": Batch([SHARER]),
        # The first two grow until the others have to make room.
        "small pool": Batch(
            [*opted_out, *(unprotected(i, 70 + 5 * i, 80) for i in range(3))], pool=15 * groups
        ),
        "abort": Batch([unprotected(i, 200, 60) for i in range(3)], abort={0: 15, 1: 45}),
        "few tokens": Batch([unprotected(2, 127, 36), unprotected(3, 70, 29)]),
    }


@pytest.fixture(scope="module")
def runs(demo_model: Path) -> Any:
    """The batches by form and runner, each engine once."""

    @cache
    def of(
        form: str, runner: str, asynchronous: bool = False, like_a_gpu: bool = False
    ) -> dict[str, Any]:
        groups = FORMS[form].get("layer_groups", 1)
        wanted = batches(groups)
        if asynchronous or groups > 1:
            wanted = {name: wanted[name] for name in ("all evict", "small pool", "few tokens")}
        if like_a_gpu:
            wanted = {"few tokens": wanted["few tokens"]}
        return record(
            demo_model,
            wanted,
            NUM_BLOCKS,
            runner=runner,
            kv_policy={**POLICY, **FORMS[form], "impl": "triton" if like_a_gpu else "auto"},
            asynchronous=asynchronous,
            like_a_gpu=like_a_gpu,
        )

    return of


@pytest.fixture(scope="module")
def stock(demo_model: Path) -> dict[str, Any]:
    wanted = {"nothing is due": batches()["nothing is due"]}
    return {
        runner: record(demo_model, wanted, NUM_BLOCKS, runner=runner, plugin=False)
        for runner in RUNNERS
    }


def tokens(batch: dict[str, Any]) -> list[list[int] | None]:
    return [output and output["token_ids"] for output in batch["outputs"]]


def asked_for(name: str) -> list[int]:
    return [asked["params"]["max_tokens"] for asked in batches()[name].requests]


def test_the_interpreter_runs_stock_v2_to_the_tokens_of_stock_v1(stock: dict[str, Any]) -> None:
    assert stock["V1"]["runner"] == "vllm.v1.worker.cpu_model_runner"
    assert stock["V2"]["runner"] == "vllm.v1.worker.cpu.model_runner"
    v1, v2 = (stock[runner]["batches"]["nothing is due"] for runner in RUNNERS)
    assert tokens(v1) == tokens(v2)


@pytest.mark.parametrize("form", ["block", "token"])
def test_nothing_evicted_gives_the_very_bits_of_stock_v2(
    runs: Any, stock: dict[str, Any], form: str
) -> None:
    ours = runs(form, "V2")
    assert ours["runner"] == stock["V2"]["runner"]
    ours, theirs = (run["batches"]["nothing is due"] for run in (ours, stock["V2"]))
    assert not any(ours["events"])
    assert ours["outputs"] == theirs["outputs"]


@pytest.mark.parametrize("form", FORMS)
def test_v1_and_v2_keep_the_same_and_answer_the_same(runs: Any, form: str) -> None:
    v1, v2 = (runs(form, runner)["batches"] for runner in RUNNERS)
    for name in v1:
        assert v1[name]["events"] == v2[name]["events"], name
        assert tokens(v1[name]) == tokens(v2[name]), name
    events = [event for of_request in v2["all evict"]["events"] for event in of_request]
    assert all(v2["all evict"]["events"])
    assert len(events) >= 6
    assert all(("kept" in event) == (form == "token") for event in events)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_the_adapter_knows_the_holes_of_every_row(runs: Any, runner: str, form: str) -> None:
    for name, batch in runs(form, runner)["batches"].items():
        assert (batch["holes"] > 0) == any(batch["events"]), name
        assert batch["miscounted"] == 0, name


@pytest.mark.parametrize("form", FORMS)
def test_every_v2_request_gets_its_tokens_and_every_block_returns(runs: Any, form: str) -> None:
    for name, batch in runs(form, "V2")["batches"].items():
        if name != "abort":
            assert [len(ids or ()) for ids in tokens(batch)] == asked_for(name), name
        assert batch["free"] == batch["pool"], name


@pytest.mark.parametrize("form", ["block", "token"])
def test_v2_evicts_a_shared_prefix_for_one_request_only(runs: Any, form: str) -> None:
    batch = runs(form, "V2")["batches"]["shared prefix"]
    evicting, sharer = batch["events"]
    lost = {block for event in evicting for block in event["left"][0]}
    renewed = {block for event in evicting for block in event.get("fresh", ())}
    assert (lost | renewed) & set(range(SHARED_BLOCKS)), "no shared block was evicted"
    assert not sharer
    assert batch["cached"] >= SHARED_BLOCKS
    assert batch["changed"] == 0
    (alone,) = tokens(runs(form, "V2")["batches"]["sharer alone"])
    assert tokens(batch)[1] == alone


@pytest.mark.parametrize("form", FORMS)
def test_a_v2_request_that_evicted_is_preempted_and_resumes(runs: Any, form: str) -> None:
    batch = runs(form, "V2")["batches"]["small pool"]
    again = [
        len(events) > at[-1] > 0
        for events, at in zip(batch["events"], batch["preempted"], strict=True)
        if at
    ]
    assert any(again), "no request evicted before it was preempted and after it resumed"


@pytest.mark.parametrize("form", ["block", "token"])
def test_a_v2_request_that_is_aborted_leaves_no_block_behind(runs: Any, form: str) -> None:
    batch = runs(form, "V2")["batches"]["abort"]
    first, second, stays = tokens(batch)
    assert (first, second) == (None, None)
    assert stays is not None
    assert len(stays) == asked_for("abort")[2]
    assert all(batch["events"])
    assert batch["free"] == batch["pool"]


def test_v2_scheduled_ahead_keeps_the_same_tokens(runs: Any) -> None:
    """Token granularity: survivors move before the next step, whatever is in flight."""
    ahead = runs("token", "V2", asynchronous=True)
    assert ahead["scheduler"] == "GKVAsyncScheduler"
    ahead, sync = (run["batches"] for run in (ahead, runs("token", "V2")))
    assert ahead["all evict"]["events"] == sync["all evict"]["events"]
    assert tokens(ahead["all evict"]) == tokens(sync["all evict"])
    assert any(ahead["small pool"]["preempted"])
    for name in ahead:
        assert [len(ids or ()) for ids in tokens(ahead[name])] == asked_for(name)
        assert ahead[name]["free"] == ahead[name]["pool"]


@pytest.mark.parametrize("form", FORMS)
def test_kernels_on_the_path_of_a_gpu_keep_and_answer_the_same(runs: Any, form: str) -> None:
    """TRITON_ATTN and its cache, live tables at addresses that stay, `--kv-impl triton`."""
    ours, theirs = runs(form, "V2", like_a_gpu=True), runs(form, "V1")
    assert (ours["operators"], ours["attention"]) == ("triton", ["ObservedTritonAttentionImpl"])
    assert theirs["operators"] != "triton"
    assert theirs["attention"] == ["ObservedCPUAttentionBackendImpl"]
    ours, theirs = (run["batches"]["few tokens"] for run in (ours, theirs))
    assert ours["events"] == theirs["events"]
    assert tokens(ours) == tokens(theirs)
    assert sum(map(len, ours["events"])) >= 3
    assert ours["holes"] > 0
    assert ours["miscounted"] == 0
    assert ours["free"] == ours["pool"]


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    arguments = [
        *("--max-model-len", "2048", "--block-size", "32", "--served-model-name", "demo"),
        *("--num-gpu-blocks-override", "100", "--enforce-eager", "--dtype", "float32"),
        *("--kv-policy", "gkv", "--kv-budget", "64", "--kv-interval", "32"),
    ]
    log = tmp_path_factory.mktemp("server") / "serve.log"
    with serve(demo_model, *arguments, log=log, env=RUNNERS["V2"]) as up:
        yield up


def test_a_v2_server_evicts_and_its_metrics_prove_it(server: Any) -> None:
    body = {
        "model": "demo",
        "prompt": prompt(5, 40),
        "max_tokens": 170,
        "temperature": 0,
        "ignore_eos": True,
    }
    response = httpx.post(f"{server.api_url}/completions", json=body, timeout=240, trust_env=False)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 170
    assert "Using V2 Model Runner" in server.log.read_text()
    metrics = server.metrics()
    # Two blocks of prompt are protected; 96 tokens more are due, then every 32, up to 210 tokens.
    assert metrics.value("gkv:evictions_total") == 2
    freed = metrics.value("gkv:blocks_freed_total")
    assert freed == metrics.value("gkv:tokens_evicted_total") / BLOCK_SIZE >= 2
    assert metrics.value("gkv:policy_info", policy="gkv") == 1
