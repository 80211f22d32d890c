# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The evaluation against real servers: the model in the repository, evictions proven, going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from gkv_vllm.config import KVPolicyConfig
from gkv_vllm.eval.__main__ import main
from gkv_vllm.eval.clairvoyant import Reader, Text, follow
from gkv_vllm.eval.exams import EXAMS
from gkv_vllm.eval.store import Store
from gkv_vllm.eval.vocabulary import encode
from gkv_vllm.record import read_record
from gkv_vllm.view.fates import NEVER, fates_of

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
PLAN = {
    "model": str(ROOT / "models" / "reasoner"),
    "length": 448,
    "samples": 6,
    "concurrency": 6,
    "exams": ["ledger", "prose"],
    "budgets": [96, 400],
    "record": 1,
    "dtype": "float32",
    "common": {"interval": 32},
    "servers": {
        "gkv": {"policy": "gkv"},
        "groups": {
            "policy": "gkv",
            "granularity": "block",
            "layer_groups": 2,
            "exams": ["prose"],
            "budgets": [96],
        },
    },
}
FORM = ("granularity", "layer_groups")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    assert main(["run", str(folder / "plan.yaml"), "--out", str(folder / "out")]) == 0
    return folder


def test_the_full_cache_answers_and_evicts_nothing(measured):
    store = Store(measured / "out")
    full = store.metrics("ledger__full")
    assert full["accuracy"] > 0.97 and full["answers"] > 100
    assert full["evictions"] == 0 and full["preemptions"] == 0


def test_a_small_budget_evicts_and_a_large_one_is_marked(measured):
    store = Store(measured / "out")
    small, large = (store.metrics(f"ledger__gkv__b{budget}__none") for budget in (96, 400))
    # Each of six requests grows to 448 tokens over a budget of 96, 32 at a time.
    assert small["evictions"] >= 6 * 8 and small["evicted"]
    assert large["evictions"] == 0 and not large["evicted"]
    report = (measured / "out" / "report.md").read_text()
    assert report.count("not comparable") == 2


def test_a_budget_that_is_not_reached_gives_the_texts_of_the_full_cache(measured):
    store = Store(measured / "out")
    for exam in ("ledger", "prose"):
        full, large = (store.predictions(f"{exam}__{cell}") for cell in ("full", "gkv__b400__none"))
        assert [p["text"] for p in full] == [p["text"] for p in large]


def test_prose_has_a_loss(measured):
    full = Store(measured / "out").metrics("prose__full")
    assert 0 < full["loss"] < 2


def test_what_is_measured_is_not_measured_again(measured):
    cell = measured / "out" / "ledger__full"
    before = (cell / "metrics.json").stat().st_mtime_ns
    assert main(["run", str(measured / "plan.yaml"), "--out", str(measured / "out")]) == 0
    assert (cell / "metrics.json").stat().st_mtime_ns == before
    assert json.loads((cell / "config.json").read_text())["length"] == 448


def test_the_first_text_of_each_cell_is_recorded(measured):
    store = Store(measured / "out")
    first = store.predictions("ledger__gkv__b96__none")[0]
    record = read_record(store.root / "ledger__gkv__b96__none" / f"{first['seed']}.npz")
    assert record.header.budget == 96 and len(list(record.events())) >= 8
    words = encode([*first["prompt"].split(), *first["text"].split()])
    assert record.token_ids.tolist()[: len(words)] == words
    assert not list(store.root.glob("*__full/*.npz"))
    # Of what was given, each word is the document's, whatever was evicted.
    question = EXAMS["ledger"].question(first["seed"], 448)
    own = {at for answer in question.asked for at in question.owned(answer)}
    said = first["text"].split()
    assert all(said[at] == w for at, w in enumerate(question.document) if at not in own)


def test_what_is_read_costs_more_where_it_was_forgotten(measured):
    store = Store(measured / "out")
    full, small = (store.metrics(f"prose__{cell}") for cell in ("full", "gkv__b96__none"))
    assert small["loss"] > full["loss"] and small["accuracy"] <= full["accuracy"]


@pytest.mark.parametrize("server", PLAN["servers"])
def test_offline_reading_says_what_the_engine_said(measured, server):
    """With the survivors that a record names, and only with them; and when requests fall due."""
    store, cell = Store(measured / "out"), f"prose__{server}__b96__none"
    prediction = store.predictions(cell)[0]
    record = read_record(store.root / cell / f"{prediction['seed']}.npz")
    fates = fates_of(record)
    due = [event["num_tokens"] for event in fates.events]
    question = EXAMS["prose"].question(prediction["seed"], 448)
    text = Text(Reader(PLAN["model"]), EXAMS["prose"], question)
    tokens = len(text.asked)
    left = torch.from_numpy(fates.left[0].astype(int)).unflatten(0, (2, 4))[..., :tokens]
    blind = torch.full_like(left, tokens)
    for number, now in enumerate(due):
        blind[left == number] = now
    assert (blind < tokens).sum() > 1000 and (left[..., -1] == NEVER).all()

    found, whole = text.predict(blind), text.predict(None)
    assert abs(found.loss - prediction["loss"]) < 1e-6 < 0.03 < prediction["loss"] - whole.loss
    assert found.text == prediction["text"]
    # One step later, and it is another text.
    blind[blind < tokens] += 1
    assert abs(text.predict(blind).loss - prediction["loss"]) > 1e-4

    settings = {"policy": "gkv", "budget": 96, "interval": 32}
    config = KVPolicyConfig.from_mapping(
        settings | {k: v for k, v in PLAN["servers"][server].items() if k in FORM}
    )
    ours, events = follow(
        config,
        config.for_request({"kv_protect": "none"}, 32),
        text.worth,
        tokens=tokens,
        prompt=len(question.prompt),
        block_size=32,
        shape=(2, 4),
    )
    assert sorted(set(ours[ours < tokens].tolist())) == due and events == len(due)
    assert ((ours < tokens).sum(-1) == (left < NEVER).sum(-1)).all()
