# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The demo model is the same everywhere, and its tokenizer loses nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

import gkv_vllm

SCRIPT = Path(gkv_vllm.__file__).parents[1] / "scripts" / "make_demo_model.py"
SMALL = ["--layers", "1", "--hidden", "32", "--intermediate", "32", "--heads", "2"]


def make(out: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(out), *SMALL, *extra]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model")
    assert make(out).returncode == 0
    return out


def test_same_arguments_give_the_same_bytes(model_dir, tmp_path):
    assert make(tmp_path / "again").returncode == 0
    for file in model_dir.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_second_run_keeps_the_weights(model_dir):
    before = (model_dir / "model.safetensors").stat().st_mtime_ns
    assert "up to date" in make(model_dir).stdout
    assert (model_dir / "model.safetensors").stat().st_mtime_ns == before


def test_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("four years of work")
    assert make(tmp_path).returncode != 0
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("text", ["plain", "naïve café — 中文 🙂", "\t\n  \x00\x7f", ""])
def test_tokenizer_round_trips(model_dir, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_chat_template_ends_where_the_assistant_speaks(model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
