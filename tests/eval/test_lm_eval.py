# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""configs/lm_eval: its data and grading, and lm-evaluation-harness against a served policy."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gkv_vllm.serving import Server, serve

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "lm_eval"
TASKS = ("copyback", "once")


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"lm_eval_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def stored(task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{task}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_stored_prompts_are_what_the_script_draws(task: str) -> None:
    assert stored(task) == module("make_data").documents(task)


@pytest.mark.parametrize("task", TASKS)
def test_the_right_continuation_is_all_right_and_a_wrong_symbol_is_not(task: str) -> None:
    grade = module("grading").grade
    for document in stored(task):
        assert grade(document, [document["answer"]]) == {"accuracy": 1.0, "all_right": 1.0}
        words = document["answer"].split()
        last = max(
            i for i, word in enumerate(words) if word[0] in "ABCDEFGHIJKL" and word[1:].isdigit()
        )
        words[last] = "A0" if words[last] != "A0" else "A1"
        wrong = grade(document, [" ".join(words)])
        assert wrong["all_right"] == 0.0 and 0.8 < wrong["accuracy"] < 1.0
        assert grade(document, [""])["accuracy"] == 0.0


# ---- with lm-evaluation-harness


@pytest.fixture(scope="module")
def lm_eval() -> str:
    """The command: $GKV_LM_EVAL, beside this interpreter, or in build/lm-eval."""
    beside = Path(sys.executable).with_name("lm-eval")
    local = ROOT / "build" / "lm-eval" / "bin" / "lm-eval"
    for found in (os.environ.get("GKV_LM_EVAL"), shutil.which(beside), shutil.which(local)):
        if found:
            return found
    pytest.skip("no lm-eval command: see docs/evaluation.md, or set GKV_LM_EVAL")


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reasoner's architecture and tokenizer with drawn weights."""
    from gkv_vllm.eval.train import MAX_POSITIONS, Recipe, build
    from gkv_vllm.eval.vocabulary import tokenizer

    path = tmp_path_factory.mktemp("reasoner")
    build(Recipe(layers=2)).to(torch.bfloat16).save_pretrained(path)
    tokenizer(MAX_POSITIONS).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(reasoner: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [
        *("--max-model-len", "1024", "--block-size", "32", "--num-gpu-blocks-override", "160"),
        *("--kv-policy", "gkv", "--kv-budget", "256", "--kv-interval", "32", "--enforce-eager"),
    ]
    log = tmp_path_factory.mktemp("server") / "serve.log"
    with serve(reasoner, *arguments, "--served-model-name", "reasoner", log=log) as up:
        yield up


Evaluate = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def evaluate(lm_eval: str, server: Server, reasoner: Path, tmp_path: Path) -> Evaluate:
    """Two texts of 200 tokens of the task `gkv_copyback`, with these vllm_xargs."""

    def run(**kv: Any) -> subprocess.CompletedProcess[str]:
        given = {"vllm_xargs": kv, "max_gen_toks": 200, "ignore_eos": True}
        model = {
            "model": "reasoner",
            "base_url": f"{server.api_url}/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(reasoner),
            "max_length": 1024,
            "num_concurrent": 2,
            "max_retries": 1,
        }
        command = [
            *(lm_eval, "run", "--include_path", str(FOLDER), "--tasks", "gkv_copyback"),
            *("--model", "local-completions", "--model_args", json.dumps(model), "--limit", "2"),
            *("--gen_kwargs", json.dumps(given), "--output_path", str(tmp_path / "out")),
        ]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),  # for the grading, where gkv_vllm is not installed
            "HF_DATASETS_OFFLINE": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hf"),
        }
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    return run


def evictions(server: Server) -> tuple[float, float]:
    """Evictions so far, and requests that opted out."""
    metrics = server.metrics()
    return (
        metrics.get("gkv:evictions_total"),
        metrics.get("gkv:skipped_total", reason="opted_out"),
    )


@pytest.mark.e2e
@pytest.mark.slow
def test_gen_kwargs_carry_vllm_xargs(evaluate: Evaluate, server: Server, tmp_path: Path) -> None:
    before = evictions(server)
    done = evaluate(kv_budget=96, kv_protect="none")
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    metrics = json.loads(results.read_text())["results"]["gkv_copyback"]
    assert 0 <= metrics["accuracy,none"] <= 1 and "all_right,none" in metrics
    # 225 tokens with a budget of 96 and an interval of 32: due at 128, 160, 192, 224.
    evicted = evictions(server)
    assert evicted[0] - before[0] >= 2 * 3 and evicted[1] == before[1]


@pytest.mark.e2e
@pytest.mark.slow
def test_opting_out_evicts_nothing(evaluate: Evaluate, server: Server) -> None:
    before = evictions(server)
    done = evaluate(kv_policy="none")
    assert done.returncode == 0, done.stderr[-3000:]
    assert evictions(server) == (before[0], before[1] + 2)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_bad_budget_is_http_400_with_the_sentence(evaluate: Evaluate, server: Server) -> None:
    done = evaluate(kv_budget="plenty")
    assert done.returncode != 0
    assert "400" in done.stderr and "kv_budget" in done.stderr
