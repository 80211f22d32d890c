# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Records of what requests lost, against oracles that follow the engine's moves cell by cell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from gkv_vllm.record import Event, Record, read_record
from gkv_vllm.serving import serve

from .dense import cells_of, run_and_follow
from .harness import BLOCK_SIZE, POLICY, InProcessEngine, in_process_engine, prompt, request
from .recorded import Batch, record

pytestmark = pytest.mark.e2e

FORMS: dict[str, dict[str, Any]] = {
    "block": {"granularity": "block"},
    "block, 2 groups": {"granularity": "block", "layer_groups": 2, "layer_split": "interleaved"},
    "token, head": {"scope": "head"},
    "token, layer": {"scope": "layer"},
    "token, all": {"scope": "all", "impl": "reference"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records") / "made" / "by the engine"


@pytest.fixture(scope="module", params=FORMS)
def engine(
    demo_model: Path, folder: Path, request: pytest.FixtureRequest
) -> Iterator[InProcessEngine]:
    policy = {**POLICY, **FORMS[request.param], "record_positions": str(folder)}
    with in_process_engine(demo_model, num_blocks=260, kv_policy=policy) as engine:
        yield engine


@pytest.fixture(autouse=True)
def no_records(folder: Path) -> None:
    for path in folder.glob("*"):
        path.unlink()


def records(folder: Path) -> dict[int, Record]:
    """By the request's number in the order that they were added."""
    found = [read_record(path) for path in folder.glob("*")]
    return {int(one.header.request_id.split("-")[1]): one for one in found}


def alive(one: Record, event: Event, layer: int, head: int) -> list[int]:
    """The positions below `num_tokens` that this head still sees, as a reader of the file would."""
    kept = one.header.per_head(event.positions)[layer, head]
    kept = kept[one.header.per_head(event.kept)[layer, head]]
    if one.header.granularity == "block":
        kept = (kept[:, None] + np.arange(one.header.block_size)).reshape(-1)
    around = [*range(event.protected), *range(event.recent, event.num_tokens)]
    return sorted([*around, *kept.tolist()])


def assert_alive(one: Record, event: Event, held: torch.Tensor) -> None:
    """held [layers, kv_heads, cells]: the positions that the oracle finds in each cell."""
    assert (one.header.layers, one.header.kv_heads) == held.shape[:2]
    for layer, of_layer in enumerate(held.tolist()):
        for head, cells in enumerate(of_layer):
            seen = sorted(p for p in cells if 0 <= p < event.num_tokens)
            assert alive(one, event, layer, head) == seen, (event.number, layer, head)


def assert_best_stay(event: Event) -> None:
    """So the scores stand at the positions that they are of."""
    units = event.kept.shape[-1]
    for scores, kept in zip(
        event.scores.reshape(-1, units), event.kept.reshape(-1, units), strict=True
    ):
        assert 0 < kept.sum() < len(kept)
        assert scores[kept].min() >= scores[~kept].max()


def test_a_record_holds_what_each_head_kept_and_what_the_request_was(
    engine: InProcessEngine, folder: Path, demo_model: Path
) -> None:
    engine.forget_cache()
    asked = request(prompt(90, 45), 420, kv_budget=160, kv_record=1)
    answer, survivors = run_and_follow(engine, asked)
    engine.scheduler.recorder.flush()
    (one,) = records(folder).values()
    assert one.token_ids.tolist() == asked["prompt_token_ids"] + answer["token_ids"]
    assert (one.prompt_tokens, one.finish, one.truncated) == (45, "length_capped", False)
    assert one.header.model == str(demo_model)
    assert (one.header.policy, one.header.budget, one.header.protect) == ("gkv", 160, "prompt")
    events = list(one.events())
    assert len(events) == len(one) == len(survivors.gone) > 5
    for number, (event, (position, held)) in enumerate(zip(events, survivors.gone, strict=True)):
        assert (event.number, event.epoch) == (number, 0)
        assert event.num_tokens <= position
        assert event.positions.shape[:2] == one.header.shape
        assert_alive(one, event, held)
        assert_best_stay(event)
    differ = {tuple(alive(one, events[-1], i, h)) for i in range(4) for h in range(2)}
    assert (len(differ) > 1) == (one.header.shape != (1, 1))


def test_only_who_asks_is_recorded_and_who_opts_out_loses_nothing(
    engine: InProcessEngine, folder: Path
) -> None:
    asked = [
        request(prompt(1, 40), 200, kv_budget=96),
        request(prompt(2, 40), 200, kv_budget=96, kv_record=0),
        request(prompt(3, 40), 200, kv_policy="none", kv_record=1),
    ]
    before = engine._count
    engine.run(asked)
    engine.scheduler.recorder.flush()
    ((number, one),) = records(folder).items()
    assert number == before + 3
    assert (one.header.policy, len(one)) == ("none", 0)


def test_an_aborted_request_leaves_a_record_of_what_had_happened(
    engine: InProcessEngine, folder: Path
) -> None:
    id_ = engine.add(request(prompt(5, 40), 400, kv_budget=96, kv_record=1))
    for _ in range(200):
        engine.step()
    (part,) = folder.glob("*")
    assert part.name == f"{id_}.npz.part"
    engine.llm.llm_engine.abort_request([id_], internal=True)
    engine.scheduler.recorder.flush()
    (one,) = records(folder).values()
    assert one.finish == "aborted"
    assert len(list(one.events())) > 1
    assert 190 < len(one.token_ids) - one.prompt_tokens <= 200


# ---- preempted requests, Model Runner V2 and asynchronous scheduling, in processes of their own


def recorded_batch() -> Batch:
    """The first two grow until the others have to make room."""
    opted_out = [request(prompt(60 + i, 64), 80, kv_policy="none") for i in range(2)]
    recorded = [
        # The last one is due in every chunk of its prompt.
        request(prompt(i, length), 80, kv_budget=64, kv_protect="none", kv_record=1)
        for i, length in enumerate((70, 75, 390))
    ]
    return Batch([*opted_out, *recorded], pool=15)


def oracle(events: list[dict[str, Any]], preempted: list[int], cells: int) -> list[torch.Tensor]:
    """After each event the position in each cell, by the blocks that received survivors."""
    after = []
    for number, event in enumerate(events):
        if number == 0 or number in preempted:
            held = torch.arange(cells).repeat(4, 2, 1)
        if event.get("targets"):
            sources = held[..., cells_of(event["candidates"][0])]
            keep = torch.tensor(event["kept"]).expand(4, -1, -1).expand(-1, 2, -1)
            held[..., cells_of(event["targets"])] = sources.gather(-1, keep)
        held[..., cells_of(event["left"][0])] = -1
        after.append(held.clone())
    return after


@pytest.mark.parametrize("granularity", ["block", "token"])
@pytest.mark.parametrize(
    ("runner", "asynchronous"), [("V1", False), ("V2", True)], ids=["V1", "V2 ahead"]
)
def test_a_preempted_request_starts_over_in_its_record(
    demo_model: Path, tmp_path: Path, runner: str, asynchronous: bool, granularity: str
) -> None:
    policy = {**POLICY, "min_budget": 64, "granularity": granularity}
    result = record(
        demo_model,
        {"small pool": recorded_batch()},
        160,
        runner=runner,
        kv_policy={**policy, "record_positions": str(tmp_path)},
        asynchronous=asynchronous,
    )["batches"]["small pool"]
    found = records(tmp_path)
    assert sorted(found) == [3, 4, 5]
    epochs = set()
    for number, one in found.items():
        logged, preempted = result["events"][number - 1], result["preempted"][number - 1]
        assert one.finish == "length_capped"
        cells = -(-len(one.token_ids) // BLOCK_SIZE) * BLOCK_SIZE
        assert len(one) == len(logged)
        for i, (event, held) in enumerate(
            zip(one.events(), oracle(logged, preempted, cells), strict=True)
        ):
            assert event.epoch == sum(at <= i for at in preempted)
            assert_alive(one, event, held)
            epochs.add(event.epoch)
    assert len(epochs) > 1, "no request lost tokens both before and after it was preempted"


def test_a_server_records_who_asks_under_the_id_of_its_answer(
    demo_model: Path, tmp_path: Path
) -> None:
    """Through every process between: one request ends, another runs when the server shuts down."""
    folder = tmp_path / "records"
    arguments = [
        *("--max-model-len", "2048", "--block-size", "32", "--served-model-name", "demo"),
        *("--num-gpu-blocks-override", "160", "--enforce-eager", "--dtype", "float32"),
        *("--kv-policy", "gkv", "--kv-budget", "96", "--kv-interval", "32"),
        *("--kv-record-positions", str(folder)),
    ]
    body = {"model": "demo", "prompt": prompt(5, 40), "temperature": 0, "ignore_eos": True}
    with serve(demo_model, *arguments, log=tmp_path / "serve.log") as server:
        url = f"{server.api_url}/completions"
        asked = body | {"max_tokens": 200, "vllm_xargs": {"kv_record": 1}}
        answer = httpx.post(url, json=asked, timeout=240, trust_env=False).json()
        httpx.post(url, json=body | {"max_tokens": 200}, timeout=240, trust_env=False)
        endless = asked | {"max_tokens": 1900, "stream": True}
        with httpx.stream("POST", url, json=endless, timeout=240, trust_env=False) as stream:
            next(stream.iter_lines())
    found = {path.name: read_record(path) for path in folder.glob("*.npz")}
    (finished,) = [one for name, one in found.items() if name.startswith(answer["id"])]
    assert (finished.finish, len(finished.token_ids)) == ("length_capped", 240)
    assert len(list(finished.events())) == 2
    (hung_up,) = [one for one in found.values() if one is not finished]
    assert hung_up.finish == "aborted"
