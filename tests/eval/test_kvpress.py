# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Our streaming_llm, knorm and snapkv against kvpress's presses.

`kvpress.json` has what its presses scored and kept of analytic input (`record_kvpress.py`), so that
everyone can compare. Where an interpreter with kvpress is at hand, whole models are compared."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gkv_vllm.eval.crosscheck import paged
from gkv_vllm.eval.crosscheck.agreement import compare, summarise
from gkv_vllm.eval.crosscheck.cases import KNORM, ROWS, SNAPKV, STREAMING, Row, prompts
from gkv_vllm.eval.crosscheck.text import same_text, table
from gkv_vllm.ops.layout import CPULayout
from gkv_vllm.policies import registry
from tests.policies.paged_requests import IMPLEMENTATIONS, operators

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("kvpress.json").read_text())
SETTINGS = {row["policy"]: row.get("settings", {}) for row in (STREAMING, KNORM, SNAPKV)}
EPSILON = torch.finfo(torch.float32).eps


def analytic(heads: int, tokens: int, speed: float, amplitude: float) -> Tensor:
    """As in record_kvpress.py, which runs where nothing of ours is."""
    h = torch.arange(heads, dtype=torch.float64)[:, None, None]
    t = torch.arange(tokens, dtype=torch.float64)[:, None]
    c = torch.arange(8, dtype=torch.float64)
    phase = 0.7 * (h + 1) + 0.13 * speed * (t + 1) * (c + 1) + 0.31 * speed * t
    return (amplitude * (1 + 0.1 * (t % 7)) * torch.sin(phase)).float()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("policy", SETTINGS)
def test_what_kvpress_kept_of_analytic_input(policy: str, impl: str) -> None:
    operators(impl)
    recorded = RECORDED[policy]
    eviction = paged.Eviction(64 + recorded["window"], recorded["window"], 32 + recorded["window"])
    keys = analytic(2, eviction.tokens, 1.1, 1.0)[None]
    given = {"keys": keys, "values": -keys, "queries": analytic(4, eviction.tokens, 1.7, 1.0)[None]}
    kept, scores = paged.evict(registry.create(policy, SETTINGS[policy]), given, eviction, impl)
    assert kept[0].tolist() == recorded["kept"]
    if policy != "streaming_llm":  # kvpress gives 1 to what stays and 0 to what goes
        theirs = torch.tensor(recorded["scores"])[:, :64]
        # 9 digits; sums of at most 72 numbers in another order.
        torch.testing.assert_close(scores[0], theirs, rtol=16 * EPSILON, atol=0)


def test_a_prompt_that_was_moved_wrongly_is_an_error() -> None:
    keys = analytic(2, 64, 1.1, 1.0)[None]
    cache, table = torch.zeros(3, 2, 32, 16), torch.tensor([2, 1])
    CPULayout().write(cache, table, keys[0], -keys[0])
    everything = torch.arange(64).expand(1, 2, -1)
    paged._check_moved([cache], table, keys, -keys, everything)
    with pytest.raises(RuntimeError, match="layer 0"):
        paged._check_moved([cache], table, keys, -keys, everything.flip(-1))


@pytest.mark.parametrize(
    ("tokens", "window", "budget", "kept"),
    [(512, 0, 128, 128), (512, 64, 128, 128), (513, 1, 128, 97), (500, 16, 128, 116)],
)
def test_a_budget_counts_the_blocks_of_the_newest_tokens(
    tokens: int, window: int, budget: int, kept: int
) -> None:
    assert paged.Eviction(tokens, window, budget).kept == kept


# ---- why two kept sets differ

SCORES = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 0.5, 0.2])


def head(
    ours: list[int], theirs: list[int], candidates: int = 8, error: float = 0.0, **changed: float
) -> Any:
    their_scores = SCORES.clone()
    for place, score in changed.items():
        their_scores[int(place[1:])] = score
    our_scores = their_scores[:candidates] + error
    return compare(torch.tensor(ours), torch.tensor(theirs), candidates, their_scores, our_scores)


def test_equal_sets() -> None:
    found = head([5, 2, 0], [0, 2, 5])
    assert (found.cause, found.jaccard, found.gap) == ("none", 1.0, 0.0)


def test_what_only_they_may_evict_explains_itself() -> None:
    found = head([0, 6, 7], [0, 2, 5], candidates=6)
    assert head([5, 6, 7], [0, 2, 5], candidates=6).cause == "newest"
    assert found.cause == "unexplained"  # 5 scores more than 0
    assert found.gap == pytest.approx(1 / 6)


def test_equal_scores_are_ties_and_the_newer_token_is_ours() -> None:
    assert head([2, 5], [0, 5], t0=4.0).cause == "ties"
    assert head([0, 5], [2, 5], t0=4.0).cause == "rounding"  # it costs nothing, but is not our rule


def test_close_scores_are_rounding_as_far_as_the_scores_themselves_are_apart() -> None:
    near = 4.0 + 2e-6
    assert head([2, 5], [0, 5], t0=near, error=2e-6).cause == "rounding"
    assert head([2, 5], [0, 5], t0=near, error=0.0).cause == "unexplained"
    assert head([2, 5], [0, 5], error=0.6).cause == "unexplained"  # wrong scores excuse nothing


def test_scores_of_another_kind_excuse_nothing() -> None:
    found = compare(torch.tensor([1, 5]), torch.tensor([0, 5]), 8, SCORES, None)
    assert (found.cause, found.score_difference) == ("unexplained", None)
    with pytest.raises(ValueError, match="twice"):
        compare(torch.tensor([5, 5]), torch.tensor([0, 5]), 8, SCORES, None)


def test_a_summary_counts_heads() -> None:
    same, other = head([5, 0], [0, 5]), head([1, 5], [0, 5])
    found = summarise([[[same, same], [same, other]], [[same, other], [same, other]]])
    assert (found.heads, found.equal) == (8, 5 / 8)
    assert found.by_head == [[1.0, 0.5], [1.0, 0.0]]
    assert found.causes["unexplained"] == 3 and found.jaccard_least == pytest.approx(1 / 3)


def test_texts_are_compared_up_to_where_they_part() -> None:
    mine = {"tokens": [1, 2, 3], "logprobs": [-0.5, -1.0, -9.0]}
    other = {"tokens": [1, 2, 4], "logprobs": [-0.5, -1.25, -1.0], "margins": [3.0, 2.0, 0.1]}
    found = same_text([(mine, other), (mine, other | mine)])
    assert (found["texts"], found["same"], found["tokens_before_they_part"]) == (2, 1, 5)
    assert found["margins_where_they_part"] == [0.1]
    assert found["logprob_difference"] == 0.25


# ---- with kvpress


@pytest.fixture(scope="module")
def kvpress_python() -> str:
    """An interpreter with kvpress: $GKV_KVPRESS_PYTHON, this one, or build/kvpress."""
    import sys

    local = Path(__file__).parents[2] / "build" / "kvpress" / "bin" / "python"
    if named := os.environ.get("GKV_KVPRESS_PYTHON"):
        return named
    if find_spec("kvpress"):
        return sys.executable
    if local.exists():
        return str(local)
    pytest.skip(
        "no interpreter with kvpress, which does not go together with vLLM's transformers: "
        "see docs/evaluation.md, or set GKV_KVPRESS_PYTHON"
    )


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The architecture of the reasoner with drawn weights; key norms too, or all would tie.

    Values and outputs of attention are ten times what they are at first, so that texts depend on
    what was kept."""
    from gkv_vllm.eval.train import Recipe, build

    model = build(Recipe(layers=2))
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:
        weight = layer.self_attn.k_norm.weight.data
        weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
        layer.self_attn.q_norm.weight.data.mul_(2)
        layer.self_attn.v_proj.weight.data.mul_(10)
        layer.self_attn.o_proj.weight.data.mul_(10)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def test_prompts_are_tokens_of_the_vocabulary_and_repeat() -> None:
    drawn = prompts(ROWS, seeds=2)
    assert drawn == prompts(ROWS, seeds=2)
    assert {len(ids) for ids in drawn.values()} == {row.tokens for row in ROWS}
    assert len({tuple(ids[:400]) for ids in drawn.values()}) >= 10


def crosscheck(model: Path, python: str, rows: tuple[Row, ...], count: int) -> dict[str, Any]:
    from gkv_vllm.eval.crosscheck.__main__ import report

    return report(model, python, seeds=1, rows=rows, count=count)


def test_operators_keep_what_presses_keep(kvpress_python: str, random_model: Path) -> None:
    rows = tuple(
        replace(row, tokens=row.window + 320) for row in ROWS if row.where in IMPLEMENTATIONS
    )
    found = crosscheck(random_model, kvpress_python, rows, count=1)
    assert found["unexplained"] == 0
    by_row = {(r["policy"], r["where"], r["control"]): r["agreement"] for r in found["rows"]}
    for impl in IMPLEMENTATIONS:
        assert by_row["streaming_llm", impl, False]["equal"] == 1.0
        # Rounding swaps one token of a head now and then.
        assert by_row["snapkv", impl, False]["equal"] >= 0.9
        assert by_row["snapkv", impl, False]["jaccard_least"] > 0.97
        # In layer 0 equal words have equal norms; nothing but ties and rounding is left to differ.
        assert all(share >= 0.9 for share in by_row["knorm", impl, False]["by_head"][1])
    assert by_row["snapkv", "reference", True]["equal"] < 0.1  # another formula does not pass


@pytest.mark.e2e
def test_the_engine_keeps_and_writes_what_kvpress_does(
    kvpress_python: str, random_model: Path
) -> None:
    (row,) = [row for row in ROWS if row.where == "engine" and row.policy == "snapkv"][:1]
    found = crosscheck(random_model, kvpress_python, (row,), count=8)
    assert found["unexplained"] == 0
    assert found["rows"][0]["agreement"]["jaccard_mean"] > 0.99
    texts = found["rows"][0]["continuations"]
    assert texts["evicted"]["same"] == texts["evicted"]["texts"] == 10
    assert texts["press_against_nothing_evicted"]["same"] < 10  # eviction is seen in the texts


def test_the_page_shows_the_committed_result() -> None:
    root = Path(__file__).parents[2]
    found = json.loads((root / "benchmarks" / "results" / "cpu" / "crosscheck.json").read_text())
    page = (root / "docs" / "evaluation.md").read_text()
    shown = page.split("<!-- begin crosscheck -->\n")[1].split("<!-- end crosscheck -->")[0]
    assert shown == table(found)
    assert found["unexplained"] == 0
    assert [(r["policy"], r["where"], r["tokens"]) for r in found["rows"]] == [
        (row.policy, row.where, row.tokens) for row in ROWS
    ]
