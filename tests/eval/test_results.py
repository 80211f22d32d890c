# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""From texts to tables: grading, storing, and what the report says of a cell without evictions."""

import json

import pytest

from gkv_vllm.eval import report
from gkv_vllm.eval.ask import Prediction, loops, predict
from gkv_vllm.eval.exams import EXAMS
from gkv_vllm.eval.run import summary
from gkv_vllm.eval.store import Store


def test_a_repeating_end_is_a_loop():
    assert loops(["x", "y", "z"] * 40)
    assert not loops([str(n) for n in range(200)])
    assert not loops(["x", "y", "z"] * 20)  # too short to tell
    assert not loops([str(n % 40) for n in range(400)])  # longer than a unit


def test_a_text_is_graded_with_its_prompt():
    exam = EXAMS["ledger-free"]
    question = exam.question(0, 128)
    name, value = question.prompt[1][0], question.prompt[2]
    found = predict(exam, question, f"{name}? {value} ; {name}? x ;", "length", far=5)
    assert (found.right, found.answers, found.answers_far, found.right_far) == (1, 2, 1, 1)
    assert not found.all_right and found.words == 6


def prediction(seed, right, answers=10, loss=None):
    return Prediction(
        seed, "p", "t", "stop", 50, right, answers, 0, 0, right == answers, 0, False, loss
    )


def fill(store, server, budget, rights, evictions):
    predictions = [prediction(seed, right) for seed, right in enumerate(rights)]
    name = f"ledger__{server}__b{budget}__none" if budget else "ledger__full"
    config = {
        "server": server,
        "exam": "ledger",
        "budget": budget,
        "protect": "none",
        "length": 512,
    }
    metrics = {**summary(predictions), "evictions": evictions, "evicted": evictions > 0}
    store.write(name, predictions, metrics, config)
    return name


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "run")
    fill(store, "gkv", None, [10] * 12, 0)
    fill(store, "gkv", 128, [9] * 12, 40)
    fill(store, "random", 128, [4, 5] * 6, 40)
    fill(store, "lazy", 128, [10] * 12, 0)
    return store


def test_cells_are_written_whole(store):
    assert store.cells() == sorted(
        ["ledger__full", *(f"ledger__{s}__b128__none" for s in ("gkv", "lazy", "random"))]
    )
    (store.root / "ledger__broken__b1__none").mkdir()
    assert not store.has("ledger__broken__b1__none")
    assert len(store.predictions("ledger__full")) == 12


def test_rows_compare_with_the_baseline_and_with_the_full_cache(store):
    rows = {row["cell"]: row for row in report.rows(store, "gkv")}
    random = rows["ledger__random__b128__none"]
    assert random["against"]["difference"] == pytest.approx(-0.45)
    assert random["against"]["significant"] and random["against"]["losses"] == 12
    assert rows["ledger__gkv__b128__none"]["of_full"] == pytest.approx(0.9)
    assert "against" not in rows["ledger__gkv__b128__none"]


def test_a_cell_without_evictions_is_marked(store):
    table = report.tables(report.rows(store, "gkv"), "gkv")
    (line,) = [line for line in table.splitlines() if line.startswith("| lazy")]
    assert "**none: not comparable**" in line
    assert table.count("not comparable") == 1


def test_the_summary_has_shares_stars_and_marks(store):
    lines = report.summary(report.rows(store, "gkv"), 128).splitlines()
    assert lines[0] == "| | ledger |"
    assert lines[2:] == [
        "| full cache: accuracy | 1.000 |",
        "| gkv | 0.900 |",
        "| lazy | 1.000! |",
        "| random | 0.450* |",
    ]


def test_the_report_has_the_order_of_the_plan(store):
    (store.root / "plan.yaml").write_text("exams: [ledger]\nservers: {random: , lazy: , gkv: }\n")
    lines = report.summary(report.rows(store, "gkv"), 128).splitlines()
    assert [line.split("|")[1].strip() for line in lines[3:]] == ["random", "lazy", "gkv"]


def test_each_budget_has_a_table(store):
    fill(store, "gkv", 64, [5] * 12, 40)
    text = report.summaries(report.rows(store, "gkv"))
    assert text.index("Budget 128:") < text.index("Budget 64:")
    assert text.endswith("| gkv | 0.500 |")


def test_the_report_writes_numbers_and_plots(store):
    pytest.importorskip("matplotlib")
    written = {path.name for path in report.write(store, "gkv")}
    assert written == {"report.md", "report.json", "ledger-none.png"}
    assert len(json.loads((store.root / "report.json").read_text())) == 4


def test_losses_are_averaged_over_texts():
    assert summary([prediction(0, 5, loss=1.0), prediction(1, 5, loss=2.0)])["loss"] == 1.5
    assert summary([prediction(0, 5)])["loss"] is None
