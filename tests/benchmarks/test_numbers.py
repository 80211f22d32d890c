# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What GPU benchmarks make of their measurements, and where they let it be written."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
from gpu import common, kernels, serve_ab


def row(impl: str, requests: int, microseconds: float, operator: str = "compact") -> dict[str, Any]:
    return {
        "operator": operator,
        "impl": impl,
        "requests": requests,
        "live_tokens": 2048,
        "microseconds": microseconds,
    }


def numbers(rows: list[dict[str, Any]], more: dict[str, Any] | None = None) -> dict[str, Any]:
    about = {"device": "NVIDIA H200", "commit": "abc"}
    return {"machine": about, "quick": False, "rows": rows} | (more or {})


def test_the_faster_one_over_all_combinations_is_chosen() -> None:
    rows = [row("triton", 1, 100), row("triton", 64, 10), row("cuda", 1, 60), row("cuda", 64, 12)]
    assert kernels.faster(rows, "compact") == "cuda"  # 60 x 12 < 100 x 10
    rows[-1]["microseconds"] = 20
    assert kernels.faster(rows, "compact") == "triton"


def test_only_combinations_that_both_ran_are_compared() -> None:
    rows = [row("triton", 1, 100), row("cuda", 1, 90), row("triton", 64, 1)]
    assert kernels.faster(rows, "compact") == "cuda"


def test_triton_runs_what_cuda_does_not_have() -> None:
    rows = [row("triton", 1, 100), row("cuda", 1, 60)]
    assert kernels.faster(rows, "topk_keep") == "triton"


def test_a_choice_names_its_evidence() -> None:
    rows = [row("triton", 1, 100), row("cuda", 1, 60)]
    found = kernels.choice(numbers(rows), ["compact", "prepare_step"], "results/h200/kernels.json")
    assert found["ops"] == {"compact": "cuda", "prepare_step": "triton"}
    assert found["evidence"] == {
        "machine": "NVIDIA H200",
        "commit": "abc",
        "file": "results/h200/kernels.json",
    }


@pytest.mark.parametrize(
    "more", [{"quick": True}, {"machine": {"device": "cpu", "commit": "abc"}}, {"rows": []}]
)
def test_no_choice_is_made_without_a_measurement(more: dict[str, Any]) -> None:
    rows = [row("triton", 1, 100), row("cuda", 1, 60)]
    with pytest.raises(ValueError, match="smoke run|not measured"):
        kernels.choice(numbers(rows, more), ["compact"], "file")


def test_the_recorded_choice_has_its_evidence_or_is_triton() -> None:
    recorded = json.loads(kernels.CHOICE.read_text())
    assert set(recorded["ops"].values()) <= {"triton", "cuda"}
    if recorded["evidence"] is None:
        assert set(recorded["ops"].values()) == {"triton"}
    else:
        assert set(recorded["evidence"]) == {"machine", "commit", "file"}


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("", "unknown"),
    ],
)
def test_results_lie_in_a_folder_of_their_device(name: str, folder: str) -> None:
    assert common.folder_of(name) == folder


def asked(**more: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"device": "cpu", "quick": True, "out": None} | more)


def test_a_smoke_run_never_writes_among_the_results(tmp_path: Path) -> None:
    assert not common.out_folder(asked()).is_relative_to(common.RESULTS)
    assert common.out_folder(asked(out=tmp_path / "here")) == tmp_path / "here"
    for folder in (common.RESULTS, common.RESULTS / "h200"):
        with pytest.raises(SystemExit, match="measures nothing"):
            common.out_folder(asked(out=folder))


def test_the_cpu_is_only_for_smoke_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="add --quick"):
        common.use(asked(quick=False))


def test_a_token_of_qwen3_8b_takes_144_kib() -> None:
    assert common.QWEN3_8B.cache_bytes(1) == 144 * 1024
    assert common.QWEN3_8B.plane_bytes(1) == 36 * 8 * 4


def test_an_event_scores_as_many_requests_together_as_a_worker() -> None:
    """Read, not imported: neither vLLM nor Triton belongs into this process."""
    pattern = re.compile(r"^SCORED_TOGETHER = (\d+)$", re.MULTILINE)
    root = kernels.machine.ROOT
    files = ("benchmarks/gpu/operators.py", "gkv_vllm/worker/worker.py")
    found = [pattern.findall((root / name).read_text()) for name in files]
    assert len(found[0]) == 1 and found[0] == found[1]


# --- the server --------------------------------------------------------------------------------


def level(concurrency: int, speed: float, cut: bool = False) -> dict[str, Any]:
    return {"concurrency": concurrency, "tokens_per_second": speed, "cut": cut}


def test_a_level_is_ample_exactly_while_all_its_requests_fit_at_full_length() -> None:
    sides = {
        "stock": {"pool_tokens": 800, "levels": [level(8, 10.0), level(9, 10.0, cut=True)]},
        "policy": {"pool_tokens": 790, "levels": [level(8, 9.9), level(9, 30.0)]},
    }
    ample, bound = serve_ab.compare(sides, full_length=100)
    assert (ample["memory"], bound["memory"]) == ("ample", "memory-bound")
    assert (ample["throughput_ratio"], bound["throughput_ratio"]) == (0.99, 3.0)
    assert (ample["cut"], bound["cut"]) == (False, True)


def test_the_time_that_is_left_is_shared_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(serve_ab.time, "monotonic", lambda: now)
    weights = {("stock", 1): 1.0, ("stock", 2): 2.0, ("policy", 1): 1.0, ("policy", 2): 1.0}
    budget = serve_ab.Budget(590.0, weights)
    assert budget.take("stock", 1) == pytest.approx((590 - serve_ab.EXPECTED_START) / 5)
    now = 100.0
    assert budget.take("stock", 2) == pytest.approx((490 - serve_ab.EXPECTED_START) * 2 / 4)
    now = 390.0
    assert budget.take("policy", 1) == pytest.approx(100.0)  # no other server will start
    now = 490.0
    assert budget.take("policy", 2) == pytest.approx(100.0)


def test_stock_gets_more_time_where_the_cache_is_short() -> None:
    settings = serve_ab.Settings(Path("m"), {}, {}, (1, 64), prompt_tokens=100, tokens=900)
    shares = serve_ab.weights(settings, pool_tokens=8000)
    assert shares["stock", 1] == shares["policy", 1]
    assert shares["stock", 64] == pytest.approx(4 * shares["policy", 64])


def test_only_the_policys_side_gets_its_flags_and_its_plugin() -> None:
    settings = serve_ab.Settings(
        Path("m"), {"seed": 0, "enforce-eager": True}, {"kv-policy": "gkv"}, (1,), 1, 1
    )
    assert settings.arguments("stock") == ["--seed", "0", "--enforce-eager"]
    assert settings.arguments("policy") == [*settings.arguments("stock"), "--kv-policy", "gkv"]
    assert settings.environment_of("stock")["VLLM_PLUGINS"] == ""
    assert settings.environment_of("policy")["VLLM_PLUGINS"] == "gkv"


def test_quantiles_are_of_what_was_measured() -> None:
    gaps = [0.001 * i for i in range(1, 101)]
    assert serve_ab.milliseconds(gaps, 0.5) == 51.0
    assert serve_ab.milliseconds(gaps, 0.99) == 100.0
    assert serve_ab.milliseconds([], 0.5) is None


def test_vllm_reads_the_shape_of_the_dummy_model(tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(serve_ab.config_of(common.QWEN3_8B, 40960)))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.num_hidden_layers, config.head_dim) == ("qwen3", 36, 128)
    assert (config.num_attention_heads, config.num_key_value_heads) == (32, 8)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (
        4096,
        12288,
        151936,
    )
