# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Documents decide what is asked: scripts, what the model is let say, and what counts as right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gkv_vllm.config import ConfigError
from gkv_vllm.eval import ask
from gkv_vllm.eval.exams import EXAMS, OWN, PROCESSOR
from gkv_vllm.eval.vocabulary import IDS, encode

LENGTH = 512
DECIDED = [name for name, exam in EXAMS.items() if exam.mode != "writes"]
ANSWERED = [name for name, exam in EXAMS.items() if exam.mode == "answers"]
READ = [name for name, exam in EXAMS.items() if exam.mode == "reads"]


def choice(words, logprobs=None):
    return SimpleNamespace(text=" ".join(words), logprobs=logprobs)


def places(question):
    return [at for answer in question.asked for at in question.owned(answer)]


@pytest.mark.parametrize("name", DECIDED)
def test_a_document_answers_itself(name):
    exam = EXAMS[name]
    question = exam.question(3, LENGTH)
    grade = exam.grade(question, list(question.document))
    assert grade.accuracy == 1.0 and len(grade.answers) >= 12
    assert len(places(question)) == len(set(places(question)))
    assert min(places(question)) >= 0 and max(places(question)) < len(question.document)


@pytest.mark.parametrize("name", DECIDED)
def test_each_answer_counts_and_nothing_else_does(name):
    exam = EXAMS[name]
    question = exam.question(3, LENGTH)
    own = places(question)
    for at in range(0, len(question.document), 7):
        words = list(question.document)
        words[at] = "lane"
        wrong = [answer for answer in exam.grade(question, words).answers if not answer.right]
        assert len(wrong) == (at in own)
    assert not exam.grade(question, []).all_right


def test_what_was_asked_is_what_the_document_says():
    question = EXAMS["ledger"].question(0, LENGTH)
    words = [*question.prompt, *question.document]
    for answer in question.asked:
        name, sets = words[answer.position - 1], words[: answer.position]
        assert name.endswith("?")
        latest = len(sets) - 1 - sets[::-1].index(f"{name[0]}=")
        assert words[answer.position] == words[latest + 1]
    # Two words of a trace: the variable and what is in it.
    question = EXAMS["trace"].question(0, LENGTH)
    said = {question.document[at.start][-1] for at in map(question.owned, question.asked)}
    assert said == {"?", "="}


@pytest.mark.parametrize("name", ANSWERED)
def test_a_script_leaves_the_answers_to_the_model(name):
    exam = EXAMS[name]
    question = exam.question(1, LENGTH)
    tokens = ask.script(exam, question)
    assert sorted(places(question)) == [at for at, token in enumerate(tokens) if token == OWN]
    given = [(t, w) for t, w in zip(tokens, question.document, strict=True) if t != OWN]
    assert [t for t, _ in given] == encode([w for _, w in given])


@pytest.mark.parametrize("name", READ)
def test_a_script_that_is_read_leaves_nothing(name):
    question = EXAMS[name].question(1, LENGTH)
    assert ask.script(EXAMS[name], question) == encode(list(question.document))


def test_what_a_model_writes_by_itself_has_no_script():
    question = EXAMS["ledger-free"].question(1, LENGTH)
    assert ask.script(EXAMS["ledger-free"], question) == [] and question.asked == ()


def test_a_wrong_answer_is_what_was_said_there():
    exam = EXAMS["once-3"]
    question = exam.question(0, LENGTH)
    words = list(question.document)
    words[places(question)[0]] = "the"
    text, loss = ask.said(exam, question, choice(words))
    assert text.split() == words and loss is None
    assert ask.predict(exam, question, text, "length", 256).right == 11


@pytest.mark.parametrize("change", ["another word", "too short", "too long"])
def test_a_server_that_does_not_follow_is_found_out(change):
    exam = EXAMS["once-3"]
    question = exam.question(0, LENGTH)
    words = list(question.document)
    given = next(at for at in range(len(words)) if at not in places(question))
    if change == "another word":
        words[given] = "lane"
    words = words[:-1] if change == "too short" else words
    words = [*words, "lane"] if change == "too long" else words
    with pytest.raises(ConfigError, match=r"--logits-processors gkv_vllm\.eval\.script:Script"):
        ask.said(exam, question, choice(words))


def test_what_is_read_is_graded_by_what_the_model_would_have_said():
    exam = EXAMS["prose"]
    question = exam.question(0, LENGTH)
    words = list(question.document)
    first, second = places(question)[:2]
    # The word of the document is in the list even where it is not the likeliest.
    top = [{word: -0.5} for word in words]
    top[first] = {words[first]: -2.0, "lane": -0.1}
    top[second] = {words[second]: -0.1}
    each = [max(t.values()) for t in top]
    each[first] = -2.0
    found = SimpleNamespace(top_logprobs=top, token_logprobs=each)
    text, loss = ask.said(exam, question, choice(words, found))
    prediction = ask.predict(exam, question, text, "length", 256)
    assert prediction.answers - prediction.right == 1
    assert text.split()[first] == "lane" and text.split()[second] == words[second]
    assert loss == pytest.approx(-sum(each) / len(each))


# ---- the logits processor


VOCABULARY = 512


@pytest.fixture
def script():
    module, name = PROCESSOR.split(":")
    return getattr(pytest.importorskip(module, reason="needs vLLM"), name)


def served(script):
    model = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)
    return script(SimpleNamespace(model_config=model), torch.device("cpu"), False)


def params(value):
    return SimpleNamespace(extra_args={"script": value})


def test_only_the_scripts_token_has_a_chance(script):
    force = served(script).new_req_logits_processor(params([7, OWN, 3]))
    for output, due in (([], 7), ([7, 0], 3)):
        logits = force(output, torch.randn(IDS["<end>"] + 16))
        assert logits.argmax() == due and torch.isfinite(logits).sum() == 1
        assert logits.softmax(-1)[due] == 1.0
    for output in ([7], [7, 0, 3]):  # its own choice; past the end
        logits = torch.randn(16)
        assert torch.equal(force(output, logits.clone()), logits)


def test_a_token_that_no_model_has_is_the_models_choice(script):
    """An index out of range would end the engine."""
    force = served(script).new_req_logits_processor(params([VOCABULARY - 1, VOCABULARY, 10**9]))
    assert force([], torch.zeros(VOCABULARY)).argmax() == VOCABULARY - 1
    for output in ([0], [0, 0]):
        logits = torch.randn(VOCABULARY)
        assert torch.equal(force(output, logits.clone()), logits)


def test_who_has_no_script_is_let_be(script):
    processor = served(script)
    assert processor.new_req_logits_processor(SimpleNamespace(extra_args=None)) is None
    assert not processor.is_argmax_invariant()  # greedy requests follow scripts too


@pytest.mark.parametrize("value", ["7", 7, [7, -2], [1.0], ["7"], [True]])
def test_a_script_of_anything_else_is_refused(script, value):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="list of token ids"):
        script.validate_params(params(value))


def test_a_script_may_be_missing(script):
    script.validate_params(SimpleNamespace(extra_args=None))
    script.validate_params(params([OWN, 0, 5]))
