# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Engines of other shapes, each in a process of its own: no policy, and sliding-window layers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .harness import ENGINE_ENVIRONMENT, POLICY, prompt, request, run_elsewhere

pytestmark = pytest.mark.e2e


def test_the_plugin_without_a_policy_changes_no_bit(demo_model: Path) -> None:
    requests = [request(prompt(i, 30 + 40 * i), 40) for i in range(4)]
    with_plugin = run_elsewhere(demo_model, requests, 100)
    assert with_plugin["evictions"] is None
    assert with_plugin == run_elsewhere(demo_model, requests, 100, plugin=False)


def test_an_engine_without_a_policy_before_it_in_the_process_changes_nothing(
    demo_model: Path,
) -> None:
    """vLLM remembers the attention backend that it chose for the first one."""
    requests = [request(prompt(i, 30 + 40 * i), 250, kv_budget=96) for i in range(3)]
    policy = {**POLICY, "policy": "snapkv"}  # scores by queries alone, which the hook has to see
    fresh, after_stock = (
        run_elsewhere(demo_model, requests, 100, kv_policy=policy, stock_first=first)
        for first in (False, True)
    )
    assert fresh["evictions"] > 5
    assert after_stock == fresh


@pytest.fixture(scope="module")
def hybrid_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of four layers, every other one with a sliding window of 64 tokens."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=4096,
        bos_token_id=256,
        eos_token_id=258,
        pad_token_id=256,
    )
    path = tmp_path_factory.mktemp("hybrid")
    Gemma3ForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, path / name)
    return path


def test_a_request_that_no_pool_of_a_hybrid_could_hold_ends_with_an_error(
    hybrid_model: Path,
) -> None:
    # 21 blocks of full attention would fit into the 30 of the pool, with 11 of windows they do not.
    large, small = request(prompt(1, 60), 600, kv_policy="none"), request(prompt(2, 60), 50)
    tight = {"policy": "gkv", "budget": 96, "interval": 32, "reserve_prompt": 32}
    ours = run_elsewhere(hybrid_model, [large, small], 31, kv_policy=tight)
    assert ours["outputs"][0]["finish_reason"] == "error"
    assert len(ours["outputs"][0]["token_ids"]) <= 1
    assert len(ours["outputs"][1]["token_ids"]) == 50
    assert ours["free"] == 30


def test_requests_that_opted_out_run_as_in_stock_vllm_under_pressure(demo_model: Path) -> None:
    # 16 requests want 176 blocks of 79.
    requests = [request(prompt(i, 40), 300, kv_policy="none") for i in range(16)]
    stock = [request(prompt(i, 40), 300) for i in range(16)]
    ours = run_elsewhere(demo_model, requests, 80, kv_policy=POLICY)
    assert ours["outputs"] == run_elsewhere(demo_model, stock, 80, plugin=False)["outputs"]


def test_sliding_window_layers_are_left_alone_and_full_ones_evicted(hybrid_model: Path) -> None:
    short = [request(prompt(i, 60), 100) for i in range(3)]
    long = [request(prompt(10 + i, 60), 500, kv_budget=128) for i in range(5)]
    ours = run_elsewhere(hybrid_model, short + long, 200, kv_policy=POLICY)
    assert [len(output["token_ids"]) for output in ours["outputs"]] == [100] * 3 + [500] * 5
    # From 64 + 128 + 32 tokens on, one block for every 32 of the rest.
    assert ours["evictions"] >= 5 * 9
    assert ours["free"] == 199
    stock = run_elsewhere(hybrid_model, short, 200, plugin=False)
    untouched = run_elsewhere(hybrid_model, short, 200, kv_policy=POLICY)
    assert untouched["evictions"] == 0
    assert untouched["outputs"] == stock["outputs"]


SPLIT_BLOCKS = """
import sys
from pathlib import Path
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
CPUAttentionBackend.get_supported_kernel_block_sizes = staticmethod(lambda spec=None: [32])
sys.path.insert(0, sys.argv[1])
from harness import POLICY, InProcessEngine
InProcessEngine(
    Path(sys.argv[2]), num_blocks=80, kv_policy=POLICY, arguments={"block_size": int(sys.argv[3])}
)
"""


@pytest.mark.parametrize("block_size", [32, 64])
def test_a_backend_that_splits_blocks_is_refused(demo_model: Path, block_size: int) -> None:
    """Its kernels take blocks of 32 tokens alone, as some on a GPU do for some models."""
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", SPLIT_BLOCKS, here, str(demo_model), str(block_size)],
        env={**os.environ, **ENGINE_ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (block_size == 32), done.stderr[-4000:]
    refusal = "splits each block of 64 tokens into blocks of 32"
    assert (refusal in done.stderr) == (block_size == 64), done.stderr[-4000:]
