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


def blind_of(worth, tokens=LENGTH, prompt=40, protect="none", of_block="best", **settings):
    numbers = {"policy": "gkv", "budget": BUDGET, "interval": INTERVAL, "window": WINDOW}
    config = KVPolicyConfig.from_mapping({**numbers, "protect": protect, **settings})
    policy = config.for_request({}, BLOCK)
    return follow(
        *(config, policy, worth),
        tokens=tokens,
        prompt=prompt,
        block_size=BLOCK,
        shape=SHAPE,
        of_block=of_block,
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
    blind, events = blind_of(drawn, protect=protect, **form)
    due = sorted(set(blind[blind < LENGTH].tolist()))
    assert due[0] == kept + BUDGET + INTERVAL  # and then every interval
    assert due == list(range(due[0], LENGTH - 1, INTERVAL)) and events == len(due)
    for now in due:
        held = blind[..., :now] > now
        assert (held.sum(-1) == kept + BUDGET).all()
        assert held[..., :kept].all() and held[..., now - WINDOW :].all()


def test_what_is_worth_most_stays_and_of_equals_the_newer():
    blind, _ = blind_of(lambda _: torch.zeros(*SHAPE, LENGTH))
    first = BUDGET + INTERVAL
    assert (blind[..., :INTERVAL] == first).all() and (blind[..., INTERVAL:first] > first).all()
    old = torch.arange(LENGTH, 0, -1.0).expand(*SHAPE, -1)
    blind, _ = blind_of(lambda _: old)
    assert (blind[..., : BUDGET - BLOCK] == LENGTH).all()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_long_prompt_is_due_when_it_is_computed_and_the_last_token_never(form):
    first = 200 + (-200) % BLOCK  # in whole blocks, as the engine holds them
    blind, events = blind_of(drawn, tokens=LENGTH, prompt=200, **form)
    due = sorted(set(blind[blind < LENGTH].tolist()))
    assert due[0] == 200 and ((blind[..., :200] > 200).sum(-1) == BUDGET - (first - 200)).all()
    assert events == len(due)
    assert blind_of(drawn, tokens=BUDGET + INTERVAL + 1, **form)[1] == 0
    assert blind_of(drawn, tokens=BUDGET + INTERVAL + 2, **form)[1] == 1


def test_each_head_has_its_own_survivors_unless_they_share():
    one = torch.zeros(*SHAPE, LENGTH)
    one[1, 2, 7] = 1.0
    for form, who in (("head", [(1, 2)]), ("layer", [(1, h) for h in range(4)])):
        blind, _ = blind_of(lambda _: one, **FORMS[form])
        held = (blind[..., 7] == LENGTH).nonzero().tolist()
        assert [tuple(x) for x in held] == who
    everyone, _ = blind_of(lambda _: one, **FORMS["all"])
    assert (everyone[..., 7] == LENGTH).all()
    blocks, _ = blind_of(lambda _: one, **FORMS["groups"])
    assert (blocks[1, :, :BLOCK] == LENGTH).all() and (blocks[0, :, :BLOCK] < LENGTH).all()


def test_what_many_share_is_worth_what_it_is_worth_to_all_of_them():
    """One token to one head 1.0, another to all eight 0.5: and so with two tokens of a block."""
    worth = torch.zeros(*SHAPE, LENGTH)
    worth[0, 0, :32], worth[:, :, 32:64] = 1.0, 0.5
    narrow = {"budget": 64, "window": 16}
    blind, _ = blind_of(lambda _: worth, scope="all", tokens=98, **narrow)
    assert (blind[..., :32] == 96).all() and (blind[..., 32:] == 98).all()
    blind, _ = blind_of(lambda _: worth, scope="layer", tokens=98, **narrow)
    assert (blind[..., :32] == 96).all() and (blind[..., 32:] == 98).all()
    blind, _ = blind_of(lambda _: worth, granularity="block", tokens=98, **narrow)
    assert (blind[..., :32] == 96).all() and (blind[..., 32:] == 98).all()
    of_one = torch.zeros(*SHAPE, LENGTH)
    of_one[0, 0, 3], of_one[0, 0, 40:60] = 1.0, 0.5
    for of_block, stays in (("best", slice(0, 32)), ("total", slice(32, 64))):
        blind, _ = blind_of(
            lambda _: of_one, granularity="block", tokens=98, of_block=of_block, **narrow
        )
        assert (blind[..., stays] == 98).all() and (blind == 96).sum() == 8 * 32


def test_foresight_is_the_most_that_is_still_to_come_and_answers_count_first():
    paid = torch.zeros(*SHAPE, 7, 7)
    paid[:, :, 2, 0], paid[:, :, 3, 1], paid[:, :, 4, 2] = 0.9, 0.5, 0.4
    paid[:, :, 5, 2] = 0.3
    asked = torch.tensor([False, False, True, False, True, True, False])
    worth = foresight(paid, asked)
    assert worth(2)[0, 0, :3].tolist() == pytest.approx([0.9, 0.0005, 0.4])
    assert worth(3)[1, 3, :3].tolist() == pytest.approx([0, 0.0005, 0.4])
    assert worth(5)[0, 1, :3].tolist() == pytest.approx([0, 0, 0.3])
    assert not worth(6).any()


@pytest.mark.parametrize("exam", ["once-10", "trace"])
def test_what_is_asked_is_the_word_before_each_word_of_an_answer(reader, exam):
    question = EXAMS[exam].question(3, LENGTH)
    asked = Text(reader, EXAMS[exam], question).asked
    words = [*question.prompt, *question.document]
    assert len(asked) == len(words)
    answers = {p for a in question.asked for p in range(a.position - a.words + 1, a.position + 1)}
    assert {at + 1 for at in asked.nonzero()[:, 0].tolist()} == answers


def test_with_all_in_sight_it_reads_as_transformers_does(reader, tokens):
    with torch.inference_mode():
        want = stock_model("sdpa")(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    torch.testing.assert_close(reader.read(tokens, Sight(None)), want, atol=1e-4, rtol=0)


def stock_model(attention: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation=attention
    )


def test_what_left_is_not_seen_where_transformers_is_given_the_same_mask(reader, tokens):
    """Heads of their own survivors, the same ones in each layer, which its masks can say."""
    blind, _ = blind_of(drawn, tokens=len(tokens))
    blind = blind[:1].expand(SHAPE[0], -1, -1).contiguous()
    assert (blind[:, 0] != blind[:, 3]).any()
    at = torch.arange(len(tokens))
    heads = [blind[0, head // 2] for head in range(8)]  # two query heads look at each KV head
    sees = torch.stack([(at[None, :] <= at[:, None]) & (at[:, None] < h[None, :]) for h in heads])
    with torch.inference_mode():
        want = stock_model("sdpa")(input_ids=torch.tensor([tokens]), attention_mask=sees[None])
    found = reader.read(tokens, Sight(blind))
    torch.testing.assert_close(found, want.logits[0].log_softmax(-1), atol=1e-4, rtol=0)
    assert (found - reader.read(tokens, Sight(None))).abs().max() > 0.1


def test_layers_see_their_own_survivors(reader, tokens):
    """What one head of the last layer lost changes nothing before it was lost."""
    blind = torch.full((*SHAPE, len(tokens)), len(tokens))
    blind[1, 3, 5:200] = 300
    whole, without = (reader.read(tokens, Sight(x)) for x in (None, blind))
    torch.testing.assert_close(without[:300], whole[:300], atol=1e-5, rtol=0)
    assert (without[300:] - whole[300:]).abs().max() > 1e-3
    blind[0, 3, 5:200], blind[1] = 300, len(tokens)
    assert (reader.read(tokens, Sight(blind)) - without).abs().max() > 1e-3


def test_attention_is_the_most_of_a_group_and_ends_at_the_query(reader, tokens):
    sight = Sight(None, [])
    reader.read(tokens, sight)
    assert sight.paid is not None
    paid = torch.stack(sight.paid)
    assert paid.shape == (*SHAPE, len(tokens), len(tokens))
    assert not paid.triu(1).any() and (paid.sum(-1) > 0.999).all()
    with torch.inference_mode():
        out = stock_model("eager")(input_ids=torch.tensor([tokens]), output_attentions=True)
    want = torch.cat(out.attentions).unflatten(1, (4, 2)).amax(2)
    torch.testing.assert_close(paid, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("exam", ["once-10", "copyback-40"])
def test_who_knows_the_future_answers_what_others_forget(reader, exam):
    right = {"clairvoyant": 0, "recency": 0}
    asked = 0
    for seed in range(2):
        text = Text(reader, EXAMS[exam], EXAMS[exam].question(seed, LENGTH))
        for name, worth in {"clairvoyant": text.worth, "recency": recent}.items():
            blind, events = blind_of(
                worth, tokens=len(text.asked), prompt=len(text.question.prompt)
            )
            assert events
            found = text.predict(blind)
            right[name] += found.right
        asked += found.answers
        whole = text.predict(None)
        assert whole.right >= 0.95 * whole.answers
    assert right["clairvoyant"] >= 0.8 * asked > 0.5 * asked >= right["recency"]


def without_the_old(reader, exam):
    """A text, its words, and what remains of it to who keeps what is recent."""
    question = EXAMS[exam].question(4, LENGTH)
    text, words = Text(reader, EXAMS[exam], question), [*question.prompt, *question.document]
    blind, _ = blind_of(recent, tokens=len(words), prompt=len(question.prompt))
    return text, words, blind


def test_a_wrong_answer_stays_in_the_text_as_if_it_had_been_written_word_by_word(reader):
    """Against a reading that lets one answer after the other be the model's own."""
    text, words, blind = without_the_old(reader, "once-10")
    wrong = 0
    for at in text.asked.nonzero()[:, 0].tolist():
        (said,) = decode(reader.read(encode(words), Sight(blind))[[at]].argmax(-1).tolist())
        wrong += said != words[at + 1]
        words[at + 1] = said
    found = text.predict(blind)
    assert found.text.split() == words[len(text.question.prompt) :]
    assert found.right == found.answers - wrong and wrong > 5 and found.loss is None


def test_what_is_read_stays_the_documents_and_has_a_loss(reader):
    text, words, blind = without_the_old(reader, "prose")
    after, first = reader.read(encode(words), Sight(blind)), len(text.question.prompt)
    each = [after[at - 1, token] for at, token in enumerate(encode(words)) if at >= first]
    found = text.predict(blind)
    assert found.loss == pytest.approx(-sum(map(float, each)) / len(each), abs=1e-5)
    best = decode(after.argmax(-1).tolist())
    for place, word in enumerate(found.text.split(), first):
        assert word == (best[place - 1] if text.asked[place - 1] else words[place])


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
    ("old", "new", "arguments", "message"),
    [
        ("- ledger", "- ledger\n- ledger-free", [], "its future is not known"),
        (MODEL, "nowhere/else", [], "model nowhere/else is no folder"),
        ("- ledger", "- ledger", ["--baseline", "haed"], "did you mean 'head'"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is(
    plan, tmp_path, capsys, old, new, arguments, message
):
    changed = tmp_path / "plan.yaml"
    changed.write_text(plan.read_text().replace(old, new))
    assert main([str(changed), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Store(tmp_path / "out").cells()


def test_words_of_tokens():
    assert decode(encode(["ledger", "a=", "3"])) == ["ledger", "a=", "3"]
    assert decode([len(WORDS), len(WORDS) - 1]) == ["<pad>", WORDS[-1]]
