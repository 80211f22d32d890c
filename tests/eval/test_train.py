# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Training: it learns, and a run that was cut off goes on as if it had not been."""

import random

import pytest
import torch

from gkv_vllm.eval import train
from gkv_vllm.eval.vocabulary import SIZE, tokenizer

SMALL = train.Recipe(
    layers=1, hidden=32, intermediate=32, heads=2, kv_heads=1, tokens_per_step=512,
    tasks=("ledger", "prose"), stages=(train.Stage(64, 4, 1.01), train.Stage(96, 4, 1.01)),
)  # fmt: skip


def silent(*args):
    pass


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path, monkeypatch):
    whole = train.Trainer(SMALL, tmp_path / "whole", "cpu")
    whole.run(10, silent)
    cut = train.Trainer(SMALL, tmp_path / "cut", "cpu")
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            cut.save()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.run(10, stop)
    again = train.Trainer(SMALL, tmp_path / "cut", "cpu")
    assert again.resume() and again.step == 3
    again.run(10, silent)
    assert again.step == whole.step == 8
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)


def test_another_recipe_does_not_take_over_a_checkpoint(tmp_path):
    train.Trainer(SMALL, tmp_path, "cpu").save()
    other = train.Recipe(layers=1, hidden=64)
    with pytest.raises(SystemExit, match="another recipe"):
        train.Trainer(other, tmp_path, "cpu").resume()


def test_the_loss_falls_and_only_answers_count_as_right():
    trainer = train.Trainer(SMALL, None, "cpu")
    stage = train.Stage(64, 120, 1.01)
    first = trainer.one_step(stage)
    for _ in range(119):
        last = trainer.one_step(stage)
    # A uniform guess costs ln 512 = 6.24: that much less is more than the noise of a batch.
    assert last < first - 0.3
    batch = train.draw(random.Random(0), SMALL, 64, {"ledger": 1.0})
    _, accuracy = train.losses(trainer.model, batch, "cpu")
    assert set(accuracy) == {"ledger"} and 0 <= accuracy["ledger"] <= 1


def test_padding_costs_nothing():
    batch = train.draw(random.Random(0), train.Recipe(), 96, {"once": 1.0})
    assert (batch.weights[batch.tokens == 0] == 0).all() and (batch.tokens == 0).any()


def test_the_export_is_a_hugging_face_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = train.Trainer(SMALL, tmp_path, "cpu")
    train.export(trainer, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == SIZE and model.dtype == torch.bfloat16
    words = AutoTokenizer.from_pretrained(tmp_path / "model")("ledger a= 3 ;")["input_ids"]
    assert words == tokenizer(64)("ledger a= 3 ;")["input_ids"]
