# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Runs every case on both sides and writes how far they agree, as JSON and as a table.

`python -m gkv_vllm.eval.crosscheck --model DIR --out DIR --kvpress-python PYTHON`. The exit status
is 1 if anything disagrees that neither the newest tokens nor rounding explain."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gkv_vllm.eval.crosscheck.cases import BUDGETS, COUNT, ROWS, Row, prompts
from gkv_vllm.eval.crosscheck.engine import ENVIRONMENT

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Threads that wait for each other cost more than these models compute."""
ENGINE_SIDE = [sys.executable, "-m", "gkv_vllm.eval.crosscheck.engine"]
PRESSES_SCRIPT = Path(__file__).with_name("presses.py")


def in_its_own_process(command: list[str], job: dict[str, Any], env: dict[str, str]) -> Any:
    """What the command writes with torch.save, told the job."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder, "job.json"), Path(folder, "out.pt")
        path.write_text(json.dumps(job))
        done = subprocess.run(
            [*command, str(path), str(out)],
            env=os.environ | ONE_THREAD | env,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        return torch.load(out, weights_only=True)


def kvpress_side(
    python: str, model: Path, rows: tuple[Row, ...], ids: dict[str, Any], count: int
) -> Any:
    """Prompts as they are, and per case what the press did; texts go on only where ours do."""
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        for name in _names(row, ids):
            for budget in BUDGETS:
                kept = row.eviction(budget).kept
                case = cases.setdefault(
                    _case_key(row, name, kept),
                    {
                        "policy": row.policy,
                        "press": row.press,
                        "newest": row.spared,
                        "prompt": name,
                        "kept": kept,
                        "count": 0,
                    },
                )
                if row.where == "engine":
                    case["count"] = count
    job = {"model": str(model), "prompts": ids, "cases": list(cases.values()), "count": count}
    # Not this folder: its modules are not for that environment.
    result = in_its_own_process([python, "-P", str(PRESSES_SCRIPT)], job, {"HF_HUB_OFFLINE": "1"})
    result["cases"] = dict(zip(cases, result["cases"], strict=True))
    return result


def _case_key(row: Row, prompt: str, kept: int) -> tuple[Any, ...]:
    return row.policy, json.dumps(row.press), row.spared, prompt, kept


def _names(row: Row, ids: dict[str, Any]) -> list[str]:
    return [name for name, tokens in ids.items() if len(tokens) == row.tokens]


def our_side(
    model: Path, row: Row, ids: dict[str, Any], captured: Any, count: int
) -> list[dict[str, Any]]:
    """What we kept of each prompt with each budget: `prompt`, `budget`, `kept`, `scores`."""
    cases: list[dict[str, Any]] = [
        {"prompt": name, "budget": budget} for name in _names(row, ids) for budget in BUDGETS
    ]
    if row.where == "engine":
        whole: list[dict[str, Any]] = [
            {"prompt": name, "budget": None} for name in _names(row, ids)
        ]
        job = {
            "model": str(model),
            "policy": row.policy,
            "settings": row.settings,
            "window": row.window,
            "prompts": ids,
            "cases": cases + whole,
            "count": count,
        }
        found = in_its_own_process(ENGINE_SIDE, job, ENVIRONMENT)
        return [c | f for c, f in zip(cases + whole, found, strict=True)]
    from gkv_vllm.eval.crosscheck.paged import evict
    from gkv_vllm.policies import registry

    policy = registry.create(row.policy, row.settings)
    found = []
    for case in cases:
        kept, scores = evict(
            policy, captured[case["prompt"]], row.eviction(case["budget"]), row.where
        )
        found.append(case | {"kept": kept, "scores": scores})
    return found


def line(row: Row, ours: list[dict[str, Any]], theirs: Any) -> dict[str, Any]:
    """One row of the report."""
    from gkv_vllm.eval.crosscheck.agreement import compare, summarise

    heads = []
    for case in ours:
        if case["budget"] is None:
            continue
        eviction = row.eviction(case["budget"])
        press = theirs["cases"][_case_key(row, case["prompt"], eviction.kept)]
        layers, kv_heads, _ = case["kept"].shape
        heads.append(
            [
                [
                    compare(
                        case["kept"][i, j],
                        press["kept"][i, j],
                        eviction.candidates,
                        press["scores"][i, j],
                        case["scores"][i, j] if row.scores_comparable else None,
                    )
                    for j in range(kv_heads)
                ]
                for i in range(layers)
            ]
        )
    return {
        "policy": row.policy,
        "where": row.where,
        "window": row.window,
        "tokens": row.tokens,
        "settings": row.settings,
        "press": row.press,
        "spared": row.spared,
        "kept": [row.eviction(budget).kept for budget in BUDGETS],
        "note": row.note,
        "control": row.control,
        "agreement": summarise(heads).to_json(),
        "continuations": continuations(row, ours, theirs) if row.where == "engine" else None,
    }


def continuations(row: Row, ours: list[dict[str, Any]], theirs: Any) -> dict[str, Any]:
    """Greedy tokens of the engine against those of kvpress's model, evicted and whole."""
    from gkv_vllm.eval.crosscheck.text import same_text

    evicted, whole, changed = [], [], []
    for case in ours:
        full = theirs["prompts"][case["prompt"]]["goes_on"]
        if case["budget"] is None:
            whole.append((case["goes_on"], full))
            continue
        kept = row.eviction(case["budget"]).kept
        press = theirs["cases"][_case_key(row, case["prompt"], kept)]["goes_on"]
        evicted.append((case["goes_on"], press))
        changed.append((press, full))
    return {
        "evicted": same_text(evicted),
        "nothing_evicted": same_text(whole),
        "press_against_nothing_evicted": same_text(changed),
    }


def versions(theirs: dict[str, str]) -> dict[str, Any]:
    from gkv_vllm.ops import paged

    mine = {"operators": paged.resolve("auto").name}
    for name in ("vllm", "transformers", "torch", "gkv-vllm"):
        try:
            mine[name] = version(name)
        except PackageNotFoundError:
            mine[name] = "none"
    return {"ours": mine, "kvpress": theirs}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gkv_vllm.eval.crosscheck", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for crosscheck.json and .md"
    )
    parser.add_argument(
        "--kvpress-python", default=sys.executable, help="the interpreter that has kvpress"
    )
    parser.add_argument("--seeds", type=int, default=2, help="prompts of each task and length")
    parser.add_argument("--without-engine", action="store_true", help="compare the operators only")
    return parser.parse_args(argv)


def report(
    model: Path, python: str, seeds: int = 2, rows: tuple[Row, ...] = ROWS, count: int = COUNT
) -> dict[str, Any]:
    """The whole comparison, as what is written to crosscheck.json."""
    ids = prompts(rows, seeds)
    theirs = kvpress_side(python, model, rows, ids, count)
    lines = [line(row, our_side(model, row, ids, theirs["prompts"], count), theirs) for row in rows]
    return {
        "versions": versions(theirs["versions"]),
        "weights_sha256": hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest(),
        "budgets": list(BUDGETS),
        "tokens_generated": count,
        "prompts": len(ids),
        "rows": lines,
        "unexplained": sum(
            x["agreement"]["causes"]["unexplained"] for x in lines if not x["control"]
        ),
    }


def main(argv: list[str] | None = None) -> int:
    from gkv_vllm.eval.crosscheck.text import table, to_json

    args = parse_args(argv)
    rows = tuple(r for r in ROWS if not (args.without_engine and r.where == "engine"))
    found = report(args.model, args.kvpress_python, args.seeds, rows)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "crosscheck.json").write_text(to_json(found))
    (args.out / "crosscheck.md").write_text(table(found))
    print(table(found))
    return 1 if found["unexplained"] else 0


if __name__ == "__main__":
    sys.exit(main())
