# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Runs that would mix results or measure nothing are refused before a server starts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from gkv_vllm.config import ConfigError
from gkv_vllm.eval import run
from gkv_vllm.eval.__main__ import main
from gkv_vllm.eval.ask import predict
from gkv_vllm.eval.exams import EXAMS
from gkv_vllm.eval.plan import Plan
from gkv_vllm.eval.store import Store

PLAN = Plan(
    model="no-such-folder",
    servers={"gkv": {"policy": "gkv"}, "other": {"policy": "random"}},
    exams=("ledger",),
    budgets=(128,),
    length=256,
    samples=2,
)


def runner(store, plan=PLAN, **changes):
    return run.Runner(plan, store, 10, lambda *_: None, **changes)


def fill(store, plan=PLAN):
    """Store every cell of the plan, with texts that are right."""
    made, exam = runner(store, plan), EXAMS["ledger"]
    for server in plan.server_plans():
        for cell in server.cells:
            texts = []
            for seed in range(2):
                question = exam.question(seed, 256)
                words = exam.compose(random.Random(f"ledger 256 {seed}"), 256).words
                text = " ".join(words[len(question.prompt) : 256])
                texts.append(predict(exam, question, text, "length", run.FAR))
            metrics = {**run.summary(texts), "evictions": 1, "evicted": False}
            store.write(cell.name, texts, metrics, made._config(server, cell))


def test_what_is_stored_is_not_run_again(tmp_path):
    store = Store(tmp_path)
    fill(store)
    assert runner(store).run() == 0


@pytest.mark.parametrize(
    "change", [{"samples": 3}, {"first_seed": 1}, {"length": 512}, {"model": "other-model"},
               {"common": {"interval": 64}}], ids=lambda change: next(iter(change))
)  # fmt: skip
def test_a_folder_of_other_settings_is_refused(tmp_path, change):
    store = Store(tmp_path)
    fill(store)
    with pytest.raises(ConfigError, match="name another --out folder"):
        runner(store, replace(PLAN, **change)).run()


def test_a_model_that_is_not_there_is_refused_before_a_server_starts(tmp_path):
    with pytest.raises(ConfigError, match="model models/none is no folder with a config.json"):
        runner(Store(tmp_path), replace(PLAN, model="models/none")).run()
    assert not (tmp_path / "logs").exists()


def test_a_server_that_the_plan_does_not_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'other'"):
        runner(Store(tmp_path), only="othr")


def test_one_address_is_one_server(tmp_path):
    with pytest.raises(ConfigError, match="name the one that runs there with --only"):
        runner(Store(tmp_path), url="http://127.0.0.1:9")
    runner(Store(tmp_path), url="http://127.0.0.1:9", only="gkv")


def test_stored_texts_are_graded_again(tmp_path):
    store = Store(tmp_path)
    fill(store)
    cell = store.cells()[0]
    wrong = [{**text, "right": 0} for text in store.predictions(cell)]
    (tmp_path / cell / "predictions.jsonl").write_text(
        "".join(__import__("json").dumps(text) + "\n" for text in wrong)
    )
    assert run.regrade(store) == 3
    assert all(text["right"] == text["answers"] > 0 for text in store.predictions(cell))
    assert store.metrics(cell)["accuracy"] == 1.0 and not store.metrics(cell)["evicted"]


def test_a_text_of_another_prompt_is_not_graded_again(tmp_path):
    store = Store(tmp_path)
    fill(store)
    path = tmp_path / store.cells()[0] / "predictions.jsonl"
    path.write_text(path.read_text().replace("ledger ", "ledger ledger ", 1))
    with pytest.raises(ConfigError, match="draws another prompt now"):
        run.regrade(store)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["report", "{}"], "holds no finished cell"), (["regrade", "{}"], "no finished cell")],
)  # fmt: skip
def test_a_report_of_nothing_is_an_error(tmp_path, capsys, arguments, sentence):
    assert main([part.format(tmp_path) for part in arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-3", "nan"])
def test_minutes_are_more_than_none(minutes):
    with pytest.raises(SystemExit):
        main(["run", "plan.yaml", "--out", "x", "--minutes", minutes])
