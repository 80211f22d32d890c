# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The demo's verdict and excerpt, on made-up runs; `make demo` itself starts a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from gkv_vllm import demo
from gkv_vllm.eval.tasks import Answer, Grade

SETTINGS = demo.Settings(
    model=Path("m"), requests=2, tokens=6, policy="gkv", budget=256, interval=64, block_size=32,
    blocks=320, log=Path("log"),
)  # fmt: skip


def run(policy: str, *, evictions: int = 0, tokens: int = 6, right: int = 3) -> demo.Run:
    answers = [Answer(100 + n, 40 + n, n < right) for n in range(4)]
    made = demo.Run(policy, completion_tokens=[tokens] * 2, evictions=evictions, blocks_freed=5)
    made.texts = ["a? 3 ; b? 4 ;"] * 2
    made.grades = [Grade(answers, 0)] * 2
    return made


def test_a_proof_names_evictions_and_answers():
    ok, sentence = demo.verdict(SETTINGS, run("none", right=4), run("gkv", evictions=12))
    assert ok and "12 evictions" in sentence
    assert "75.0 % were right with eviction and 100.0 % without" in sentence


@pytest.mark.parametrize(
    ("stock", "policy", "why"),
    [
        ({}, {}, "no eviction happened"),
        ({"evictions": 3}, {"evictions": 3}, "3 evictions hit requests that had opted out"),
        ({"tokens": 5}, {"evictions": 3}, "kv_policy=none, 2 of 2 requests finished with other"),
    ],
)
def test_what_proves_nothing_fails(stock, policy, why):
    ok, sentence = demo.verdict(SETTINGS, run("none", **stock), run("gkv", **policy))
    assert not ok and why in sentence


def test_both_policies_are_asked_the_same():
    first, second = demo.questions(SETTINGS), demo.questions(SETTINGS)
    assert first == second and len({question.text for question in first}) == 2


def test_the_excerpt_names_the_oldest_right_answer():
    from io import StringIO

    from rich.console import Console

    question = demo.questions(SETTINGS)[0]
    name, value = question.prompt[1][0], question.prompt[2]
    made = demo.Run("gkv", texts=[f"{name}? {value} ; {name}? x ;"])
    made.grades = [demo.EXAM.grade(question, made.texts[0].split())]
    out = StringIO()
    demo.show_excerpt(Console(file=out, width=300), SETTINGS, made)
    age = len(question.prompt) + 1 - 2
    assert f"{name}? {value}, was last written {age} tokens before" in out.getvalue()


def test_a_summary_counts_what_was_asked():
    summary = run("gkv", evictions=1).summary()
    assert (summary["facts_asked"], summary["facts_right_percent"]) == (8, 75.0)


def test_a_run_that_was_never_sampled_says_so_in_its_table():
    from io import StringIO

    from rich.console import Console

    seen, unseen = run("gkv", evictions=1), run("none")
    seen.grades = [Grade([], 0)] * 2
    seen.blocks_in_use, seen.blocks_per_request, seen.requests_running = [9, 12], [4.5, 6.0], [2, 2]
    assert unseen.summary()["requests_running_mean"] is None
    assert seen.summary()["blocks_in_use_peak"] == 12
    assert seen.summary()["blocks_per_request_mean"] == 5.2
    out = StringIO()
    demo.show(Console(file=out, width=120), SETTINGS, [unseen, seen])
    row = next(x for x in out.getvalue().splitlines() if "running together" in x)
    assert "not seen" in row and "2.0" in row
