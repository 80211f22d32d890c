# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Sends an exam's questions to a server through the OpenAI API and notes what came back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from gkv_vllm.config import ConfigError
from gkv_vllm.eval.exams import ARGUMENT, OWN, PROCESSOR, Exam, Question
from gkv_vllm.eval.vocabulary import PAD, encode

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import CompletionChoice

LOOP_UNIT, LOOP_WORDS = 32, 96
"""A text loops when its last 96 words repeat a unit of at most 32."""


@dataclass(frozen=True)
class Prediction:
    """A text and its grade."""

    seed: int
    prompt: str
    text: str
    finish_reason: str
    words: int
    right: int
    answers: int
    right_far: int
    answers_far: int
    all_right: bool
    broken: int
    loops: bool
    loss: float | None = None
    """Mean negative log-probability of a document's words as they were read, nats per word."""
    request: str = ""
    """The id of the server's response."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def loops(words: Sequence[str]) -> bool:
    """Whether the end of a text does nothing but repeat itself."""
    tail = list(words[-LOOP_WORDS:])
    if len(tail) < LOOP_WORDS:
        return False
    return any(tail[unit:] == tail[:-unit] for unit in range(1, LOOP_UNIT + 1))


def predict(exam: Exam, question: Question, text: str, finish_reason: str, far: int) -> Prediction:
    """Grade a text; an answer is far when its fact was last written more than `far` words ago."""
    words = text.split()
    grade = exam.grade(question, words)
    distant = [answer for answer in grade.answers if answer.age > far]
    return Prediction(
        seed=question.seed,
        prompt=question.text,
        text=text,
        finish_reason=finish_reason,
        words=len(words),
        right=sum(answer.right for answer in grade.answers),
        answers=len(grade.answers),
        right_far=sum(answer.right for answer in distant),
        answers_far=len(distant),
        all_right=grade.all_right,
        broken=grade.broken,
        loops=loops(words),
    )


def script(exam: Exam, question: Question) -> list[int]:
    """The token at each place of the text, `OWN` where the model answers; empty if it writes all.

    `<end>` is a word like any other here: the text is over when it is long enough."""
    if exam.mode == "writes":
        return []
    tokens = encode(list(question.document))
    if exam.mode == "answers":
        for at in question.own:
            tokens[at] = OWN
    return tokens


def said(exam: Exam, question: Question, choice: CompletionChoice) -> tuple[str, float | None]:
    """What the model said, and for documents that it reads their mean loss in nats per word.

    Raises ConfigError if the text is not the document's where it has to be."""
    words = choice.text.split()
    if exam.mode == "writes":
        return choice.text, None
    own = set(question.own)
    given = [at for at in range(len(question.document)) if exam.mode == "reads" or at not in own]
    if len(words) != len(question.document) or any(
        words[at] != question.document[at] for at in given
    ):
        raise ConfigError(
            f"a text of {exam.name} is not the one that was asked for: start the server with "
            f"--logits-processors {PROCESSOR}"
        )
    if exam.mode == "answers":
        return choice.text, None
    found = choice.logprobs
    assert found is not None and found.top_logprobs is not None
    for at in own:
        best = found.top_logprobs[at]
        words[at] = max(best, key=lambda word: best[word]).strip() or PAD
    each = [x for x in found.token_logprobs or [] if x is not None]
    return " ".join(words), -sum(each) / len(each)


async def ask_all(
    client: AsyncOpenAI,
    model: str,
    exam: Exam,
    questions: Sequence[Question],
    xargs: dict[str, Any],
    far: int,
    done: Callable[[], None],
    record: int = 0,
) -> list[Prediction]:
    """All questions at once, in the order given; the first `record` ask to be recorded.

    openai.OpenAIError when the server refuses one, ConfigError when it does not follow a script."""

    async def one(question: Question, recorded: bool) -> Prediction:
        sampling = question.sampling
        scripted = script(exam, question)
        arguments = {**xargs, **({"kv_record": 1} if recorded else {})}
        body: dict[str, Any] = {"vllm_xargs": arguments}
        if scripted:
            arguments[ARGUMENT] = scripted
            # No word may end such a text, or be left out of it.
            body |= {"ignore_eos": True, "skip_special_tokens": False}
        if "min_p" in sampling:
            body["min_p"] = sampling["min_p"]
        response = await client.completions.create(
            model=model,
            prompt=question.text,
            max_tokens=question.max_tokens,
            temperature=sampling["temperature"],
            seed=sampling.get("seed"),
            logprobs=1 if exam.mode == "reads" else None,
            extra_body=body,
        )
        done()
        (choice,) = response.choices
        text, loss = said(exam, question, choice)
        graded = predict(exam, question, text, choice.finish_reason, far)
        return replace(graded, loss=loss, request=response.id)

    asked = (one(question, number < record) for number, question in enumerate(questions))
    return list(await asyncio.gather(*asked))
