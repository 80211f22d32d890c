# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The tasks: what they draw is right by their own grading, and what is wrong is found."""

import random

import pytest

from gkv_vllm.eval.exams import EXAMS
from gkv_vllm.eval.tasks import TASKS
from gkv_vllm.eval.tasks.once import Once
from gkv_vllm.eval.vocabulary import (
    DIGITS,
    IDS,
    PLACES,
    SYMBOLS,
    VERBS,
    WORDS,
    encode,
    tokenizer,
)

LENGTHS = (64, 100, 384, 1024, 2048)
SEEDS = range(8)


def drawn(name, length, seed):
    return TASKS[name].draw(random.Random(seed), length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TASKS)
def test_a_drawn_document_is_all_right(name, length):
    for seed in SEEDS:
        document = drawn(name, length, seed)
        grade = TASKS[name].grade(document.words, document.prompt)
        assert grade.all_right and grade.broken == 0
        assert len(document.weights) == len(document.words) > document.prompt > 0
        assert len(document.words) <= length + 14
        assert name in ("once", "copyback") or len(document.words) >= length - 14
        encode(document.words)


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_matters(name):
    """Another word in the place of any one answer makes exactly that one wrong, or more."""
    document = drawn(name, 384, 3)
    for answer in TASKS[name].grade(document.words, document.prompt).answers:
        words = list(document.words)
        pool = DIGITS if words[answer.position] in DIGITS else SYMBOLS
        words[answer.position] = next(w for w in pool if w != words[answer.position])
        again = TASKS[name].grade(words, document.prompt)
        wrong = [a.position for a in again.answers if not a.right]
        assert answer.position in wrong


@pytest.mark.parametrize("name", TASKS)
def test_weights_of_answers_are_what_is_graded(name):
    """Training calls an answer what grading calls one; training may know of more."""
    document = drawn(name, 384, 5)
    graded = {a.position for a in TASKS[name].grade(document.words, document.prompt).answers}
    assert graded <= {at for at, weight in enumerate(document.weights) if weight >= 1.0}


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_draws_the_same(name):
    assert drawn(name, 384, 7).words == drawn(name, 384, 7).words
    assert drawn(name, 384, 7).words != drawn(name, 384, 8).words


def graded(name, text, prompt):
    return TASKS[name].grade(text.split(), prompt)


def test_ledger_asks_for_the_latest_value_and_counts_from_where_it_was_last_written():
    text = "ledger a= 3 ; b= 7 ; | a? 3 ; a= 5 ; a? 5 ; b? 7 ; a? 3 ; a? 5 ;"
    grade = graded("ledger", text, 8)
    assert [(a.position, a.age, a.right) for a in grade.answers] == [
        (9, 7, True),
        (15, 3, True),
        (18, 13, True),
        (21, 6, False),
        (24, 9, True),  # a wrong answer did not write the value
    ]
    assert grade.broken == 0


def test_ledger_counts_what_makes_no_sense():
    assert graded("ledger", "ledger a= 3 ; | a? 3 3 ; b? 4 ; :07 ;", 5).broken >= 3


def test_once_wants_every_code_that_is_due():
    text = (
        "once 23h :59 :03 #beta | code #alpha A0 A1 A2 ; code #beta B0 B1 B2 ; "
        "23h :59 barn shines dock . 00h :00 recall #beta B0 B3 B2 ; <end>"
    )
    grade = graded("once", text, 6)
    assert [a.right for a in grade.answers] == [False] * 3 + [True, False, True]
    assert grade.answers[3].age == 14


def test_codes_that_were_not_stated_or_too_short_are_wrong():
    text = (
        "once 23h :59 :03 #beta | code #alpha A0 ; 23h :59 barn shines dock . "
        "00h :00 recall #alpha A0 ;"
    )
    assert [a.right for a in graded("once", text, 6).answers] == [True] + [False] * 5


def test_a_text_that_never_reaches_midnight_has_recalled_nothing():
    text = "once 23h :58 :03 #alpha | code #alpha A0 A1 A2 ; 23h :58 barn shines dock . 23h :59"
    assert [a.right for a in graded("once", text, 6).answers] == [False] * 3


@pytest.mark.parametrize(
    "minutes",
    ["23h :57 barn shines dock . 23h :59 barn shines dock .", "23h :57 barn shines dock .",
     "23h :58 barn shines dock . 23h :59 barn shines dock ."],
    ids=["skipped", "midnight early", "late start"],
)  # fmt: skip
def test_a_recall_before_its_time_proves_nothing(minutes):
    for start, said in (
        ("once 23h :57 :03 #alpha | code #alpha A0 A1 A2 ;", "recall #alpha A0 A1 A2 ;"),
        ("copyback 23h :57 :03 span A0 A1 A2 ; |", "copy A0 A1 A2 ;"),
    ):
        prompt = start.split().index("|") + 1
        grade = graded(start.split()[0], f"{start} {minutes} 00h :00 {said}", prompt)
        assert [a.right for a in grade.answers] == [False] * 3 and grade.broken == 1


def test_trace_follows_the_values_as_the_text_has_them():
    program = "trace a= 3 ; f= 8 ; @3 a f c ; @4 a a a ; @5 c a a ; | @3"
    right = "a? 3 f? 8 c= 1 ; @5 c? 1 a? 3 a= 4 ; @6"
    grade = graded("trace", f"{program} {right}", 24)
    assert [a.right for a in grade.answers] == [True] * 6 and grade.broken == 0
    wrong = "a? 3 f? 7 c= 0 ; @4 a? 3 a? 3 a= 6 ;"
    grade = graded("trace", f"{program} {wrong}", 24)
    # 3 + 7 is 0, as the text says, and after an even result comes the next line.
    assert [a.right for a in grade.answers] == [True, False, True, True, True, True]
    assert grade.broken == 0


def test_a_trace_that_lost_its_way_has_wrong_answers_until_it_finds_it_again():
    program = "trace a= 3 ; f= 8 ; @3 a f c ; @4 a a a ; @5 a a a ; | @3"
    lost = "a? 3 f? 8 c= 0 ; ; ; ; ; ; ; ; ; @4 a? 3 a? 3 a= 6 ;"
    grade = graded("trace", f"{program} {lost}", 24)
    # What it owes for the words it wasted comes last.
    assert [a.right for a in grade.answers] == [True, True, False] + [True] * 3 + [False] * 3
    assert grade.broken == 0


def test_a_trace_that_runs_a_line_that_is_not_due_is_wrong_there():
    program = "trace a= 3 ; f= 8 ; @3 a f c ; @4 a a a ; | @3"
    grade = graded("trace", f"{program} a? 3 f? 8 c= 1 ; @3 a? 3 f? 8 c= 1 ;", 19)
    assert [a.right for a in grade.answers] == [True] * 3  # line 5 is not listed: it may end
    program = "trace a= 3 ; f= 8 ; @3 a f c ; @4 a a a ; @5 a a a ; | @3"
    grade = graded("trace", f"{program} a? 3 f? 8 c= 1 ; @3 a? 3 f? 8 c= 1 ;", 24)
    assert [a.right for a in grade.answers] == [True] * 3 + [False] * 3 and grade.broken == 1


def test_one_stray_word_costs_no_line_after_it():
    program = "trace a= 3 ; f= 8 ; @3 a f c ; @4 a a a ; @5 c a a ; | @3"
    grade = graded("trace", f"{program} a? 3 f? 8 c= 1 ; ; @5 c? 1 a? 3 a= 4 ;", 24)
    assert [a.right for a in grade.answers] == [True] * 6


def test_a_trace_that_stops_early_owes_the_rest():
    program = "trace a= 3 ; f= 8 ; @3 a f c ; @4 a a a ; @5 c a a ; | @3"
    grade = graded("trace", f"{program} a? 3 f? 8 c= 1 ; " + "; " * 16, 24)
    assert [a.right for a in grade.answers] == [True] * 3 + [False] * 6


def test_trace_ages_count_from_the_last_reading():
    program = "trace a= 3 ; f= 8 ; @3 a f c ; @4 a a a ; | @3"
    grade = graded("trace", f"{program} a? 3 f? 8 c= 1 ;", 19)
    assert [a.age for a in grade.answers] == [18, 17, 2]


def test_copyback_compares_word_by_word():
    text = (
        "copyback 23h :59 :05 span A0 A1 A2 A3 A4 ; | "
        "23h :59 barn shines dock . 00h :00 copy A0 A1 A3 A3"
    )
    assert [a.right for a in graded("copyback", text, 12).answers] == [
        True,
        True,
        False,
        True,
        False,
    ]


def test_prose_wants_the_thing_of_the_person():
    text = "prose Ada's lamp . Ben's coin . | Ben's coin rolls at the farm . Ada's coin rolls ."
    assert [a.right for a in graded("prose", text, 8).answers] == [True, False]


def test_words_are_tokens_and_come_back():
    made = tokenizer(64)
    assert len(set(WORDS)) == len(WORDS) and len(made) == len(WORDS)
    document = drawn("trace", 100, 1)
    ids = made(" ".join(document.words))["input_ids"]
    assert ids == encode(document.words) == [IDS[word] for word in document.words]
    assert made.decode(ids) == " ".join(document.words)


@pytest.mark.parametrize("name", EXAMS)
def test_an_exam_asks_the_same_again_and_others_ask_differently(name):
    exam = EXAMS[name]
    question = exam.question(1, 512)
    assert question == exam.question(1, 512) != exam.question(2, 512)
    if exam.mode == "writes":
        assert question.max_tokens + len(question.prompt) == 512
    else:
        assert question.max_tokens == len(question.document)
        # Passcodes and the clock fill a text but for what is less than a line.
        assert 512 - 8 < question.max_tokens + len(question.prompt) <= 512
    document = exam.compose(random.Random(f"{name} 512 1"), 512)
    assert exam.grade(question, document.words[document.prompt : 512]).accuracy == 1.0


def test_decoys_are_no_passcode_and_no_filler():
    for seed in range(3):
        plain = Once().compose(random.Random(seed), 512, 4, 10, in_prompt=False)
        decoyed = Once().compose(random.Random(seed), 512, 4, 10, in_prompt=False, decoys=True)
        assert len(plain.words) == len(decoyed.words) and plain.weights == decoyed.weights
        changed = [b for a, b in zip(plain.words, decoyed.words, strict=True) if a != b]
        # A line has three words of its own.
        assert changed and len(changed) == 3 * sum(word == "." for word in plain.words)
        codes = {w for w in plain.words if w in SYMBOLS}
        assert not codes & set(changed) and not {*PLACES, *VERBS} & set(decoyed.words)
        assert TASKS["once"].grade(decoyed.words, decoyed.prompt).accuracy == 1.0
