# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The clairvoyant policy: who leaves when, what is then read, and that knowing the future pays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from gkv_vllm.config import KVPolicyConfig
from gkv_vllm.eval.clairvoyant import Reader, Sight, Text, follow, foresight, main
from gkv_vllm.eval.exams import EXAMS
from gkv_vllm.eval.store import Store
from gkv_vllm.eval.vocabulary import WORDS, decode, encode

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "models" / "reasoner")
LENGTH, BLOCK, SHAPE = 448, 32, (2, 4)
BUDGET, INTERVAL, WINDOW = 96, 32, 16


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(MODEL)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    question = EXAMS["ledger"].question(1, LENGTH)
    return encode([*question.prompt, *question.document])


def lives_of(worth, tokens=LENGTH, prompt=40, protect="none", **settings):
    numbers = {"policy": "gkv", "budget": BUDGET, "interval": INTERVAL, "window": WINDOW}
    config = KVPolicyConfig.from_mapping({**numbers, "protect": protect, **settings})
    policy = config.for_request({}, BLOCK)
    return follow(
        *(config, policy, worth), tokens=tokens, prompt=prompt, block_size=BLOCK, shape=SHAPE
    )


def drawn(computed: int) -> torch.Tensor:
    """Other numbers at each moment, layer and head."""
    return torch.rand(*SHAPE, LENGTH, generator=torch.Generator().manual_seed(computed))


def recent(_: int) -> torch.Tensor:
    return torch.arange(float(LENGTH)).expand(*SHAPE, -1)


FORMS = {
    "head": {},
    "layer": {"scope": "layer"},
    "all": {"scope": "all"},
    "block": {"granularity": "block"},
    "groups": {"granularity": "block", "layer_groups": 2},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("protect", "kept"), [("none", 0), ("sinks", 32), ("prompt", 64)])
def test_every_head_keeps_the_budget_the_window_and_what_is_protected(form, protect, kept):
    lives, events = lives_of(drawn, protect=protect, **form)
    due = sorted(set(lives[lives < LENGTH].tolist()))
    assert due[0] == kept + BUDGET + INTERVAL  # and then every interval
    assert due == list(range(due[0], LENGTH, INTERVAL)) and events == len(due)
    for now in due:
        held = lives[..., :now] > now
        assert (held.sum(-1) == kept + BUDGET).all()
        assert held[..., :kept].all() and held[..., now - WINDOW :].all()


def test_what_is_worth_most_stays_and_of_equals_the_newer():
    lives, _ = lives_of(lambda _: torch.zeros(*SHAPE, LENGTH))
    first = BUDGET + INTERVAL
    assert (lives[..., :INTERVAL] == first).all() and (lives[..., INTERVAL:first] > first).all()
    old = torch.arange(LENGTH, 0, -1.0).expand(*SHAPE, -1)
    lives, _ = lives_of(lambda _: old)
    assert (lives[..., : BUDGET - BLOCK] == LENGTH).all()


def test_each_head_has_its_own_survivors_unless_they_share():
    one = torch.zeros(*SHAPE, LENGTH)
    one[1, 2, 7] = 1.0
    for form, who in (("head", [(1, 2)]), ("layer", [(1, h) for h in range(4)])):
        lives, _ = lives_of(lambda _: one, **FORMS[form])
        held = (lives[..., 7] == LENGTH).nonzero().tolist()
        assert [tuple(x) for x in held] == who
    everyone, _ = lives_of(lambda _: one, **FORMS["all"])
    assert (everyone[..., 7] == LENGTH).all()
    blocks, _ = lives_of(lambda _: one, **FORMS["groups"])
    assert (blocks[1, :, :BLOCK] == LENGTH).all() and (blocks[0, :, :BLOCK] < LENGTH).all()


def test_foresight_sees_what_is_still_to_come_and_answers_first():
    paid = torch.zeros(*SHAPE, 6, 6)
    paid[:, :, 2, 0], paid[:, :, 3, 1], paid[:, :, 4, 2] = 0.9, 0.5, 0.4
    asked = torch.tensor([False, False, True, False, True, False])
    worth = foresight(paid, asked)
    assert worth(2)[0, 0, :3].tolist() == pytest.approx([0.9, 0.0005, 0.4])
    assert worth(3)[1, 3, :3].tolist() == pytest.approx([0, 0.0005, 0.4])
    assert not worth(5).any()


def test_with_all_in_sight_it_reads_as_transformers_does(reader, tokens):
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.inference_mode():
        want = stock(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    torch.testing.assert_close(reader.read(tokens, Sight(None)), want, atol=1e-4, rtol=0)


def test_what_left_is_not_seen_where_transformers_is_given_the_same_mask(reader, tokens):
    """With one kept set for all, transformers' own masks can say the same."""
    from transformers import AutoModelForCausalLM

    lives, _ = lives_of(drawn, tokens=len(tokens), scope="all")
    assert (lives == lives[:1, :1]).all()
    at = torch.arange(len(tokens))
    sees = (at[None, :] <= at[:, None]) & (at[:, None] < lives[0, 0][None, :])
    stock = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="sdpa"
    )
    with torch.inference_mode():
        want = stock(input_ids=torch.tensor([tokens]), attention_mask=sees[None, None]).logits[0]
    found = reader.read(tokens, Sight(lives))
    torch.testing.assert_close(found, want.log_softmax(-1), atol=1e-4, rtol=0)
    assert (found - reader.read(tokens, Sight(None))).abs().max() > 0.1


def test_heads_see_their_own_survivors(reader, tokens):
    """What one head of the last layer lost changes nothing before it was lost."""
    lives = torch.full((*SHAPE, len(tokens)), len(tokens))
    lives[1, 3, 5:200] = 300
    whole, without = (reader.read(tokens, Sight(x)) for x in (None, lives))
    torch.testing.assert_close(without[:300], whole[:300], atol=1e-5, rtol=0)
    assert (without[300:] - whole[300:]).abs().max() > 1e-3


def test_attention_is_the_most_of_a_group_and_ends_at_the_query(reader, tokens):
    sight = Sight(None, [])
    reader.read(tokens, sight)
    assert sight.paid is not None
    paid = torch.stack(sight.paid)
    assert paid.shape == (*SHAPE, len(tokens), len(tokens))
    assert not paid.triu(1).any() and (paid.sum(-1) > 0.999).all()
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        out = stock(input_ids=torch.tensor([tokens]), output_attentions=True)
    want = torch.cat(out.attentions).unflatten(1, (4, 2)).amax(2)
    torch.testing.assert_close(paid, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("exam", ["once-10", "copyback-40"])
def test_who_knows_the_future_answers_what_others_forget(reader, exam):
    right = {"clairvoyant": 0, "recency": 0}
    asked = 0
    for seed in range(2):
        text = Text.of(reader, EXAMS[exam].question(seed, LENGTH))
        for name, worth in {"clairvoyant": text.worth, "recency": recent}.items():
            lives, events = lives_of(
                worth, tokens=len(text.tokens), prompt=len(text.question.prompt)
            )
            assert events
            found = text.predict(exam, reader.read(text.tokens, Sight(lives)))
            right[name] += found.right
        asked += found.answers
        whole = text.predict(exam, text.whole)
        assert whole.right >= 0.95 * whole.answers and 0 < whole.loss < found.loss
    assert right["clairvoyant"] >= 0.8 * asked > 0.5 * asked >= right["recency"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    settings = {
        "model": MODEL,
        "length": LENGTH,
        "samples": 2,
        "common": {"interval": INTERVAL, "window": WINDOW},
        "exams": ["ledger"],
        "budgets": [BUDGET],
        "servers": {"head": {"policy": "gkv"}, "block": {"policy": "gkv", "granularity": "block"}},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_plan_becomes_a_folder_that_goes_on(plan, tmp_path, capsys):
    command = [str(plan), "--out", str(tmp_path)]
    assert main(command) == 0
    store = Store(tmp_path)
    assert store.cells() == ["ledger__block__b96__none", "ledger__full", "ledger__head__b96__none"]
    metrics = store.metrics("ledger__head__b96__none")
    assert metrics["evictions"] == 2 * 10 and metrics["evicted"] and metrics["answers"] > 30
    assert store.config("ledger__head__b96__none")["kv_policy"]["policy"] == "clairvoyant"
    rows = json.loads((tmp_path / "report.json").read_text())
    assert {row["server"] for row in rows if row["budget"]} == {"head", "block"}
    before = (tmp_path / "ledger__full" / "metrics.json").stat().st_mtime_ns
    assert main(command) == 0
    assert (tmp_path / "ledger__full" / "metrics.json").stat().st_mtime_ns == before
    plan_of_more = tmp_path / "more.yaml"
    plan_of_more.write_text(plan.read_text().replace("samples: 2", "samples: 3"))
    assert main([str(plan_of_more), "--out", str(tmp_path)]) == 2
    assert "with samples=2, the plan says 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("- ledger", "- ledger-free", "there is no future to know"),
        (MODEL, "nowhere/else", "model nowhere/else is no folder"),
    ],
)
def test_what_cannot_be_read_is_refused(plan, tmp_path, capsys, old, new, message):
    changed = tmp_path / "plan.yaml"
    changed.write_text(plan.read_text().replace(old, new))
    assert main([str(changed), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_words_of_tokens():
    assert decode(encode(["ledger", "a=", "3"])) == ["ledger", "a=", "3"]
    assert decode([len(WORDS) + 1]) == ["<pad>"]
