# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Sends an exam's questions to a server through the OpenAI API and notes what came back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gkv_vllm.eval.exams import Exam, Question

if TYPE_CHECKING:
    from openai import AsyncOpenAI

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
    """Mean negative log-probability of the text's words under the model without eviction, nats."""

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


async def ask_all(
    client: AsyncOpenAI,
    model: str,
    exam: Exam,
    questions: Sequence[Question],
    xargs: dict[str, Any],
    far: int,
    done: Callable[[], None],
) -> list[Prediction]:
    """All questions at once, in the order given. openai.OpenAIError when the server refuses one."""

    async def one(question: Question) -> Prediction:
        response = await client.completions.create(
            model=model,
            prompt=question.text,
            max_tokens=question.max_tokens,
            temperature=question.sampling["temperature"],
            seed=question.sampling.get("seed"),
            extra_body={
                "vllm_xargs": xargs,
                **({"min_p": question.sampling["min_p"]} if "min_p" in question.sampling else {}),
            },
        )
        done()
        (choice,) = response.choices
        return predict(exam, question, choice.text, choice.finish_reason, far)

    return list(await asyncio.gather(*(one(question) for question in questions)))


async def losses(
    client: AsyncOpenAI, model: str, texts: Sequence[tuple[str, str]]
) -> list[float | None]:
    """Mean loss in nats of each text after its prompt, read whole and without eviction.

    None for an empty text. A text that repeats itself is cheap: read it beside the loop rate."""

    async def one(prompt: str, text: str) -> float | None:
        if not text.split():
            return None
        response = await client.completions.create(
            model=model,
            prompt=f"{prompt} {text}",
            max_tokens=1,
            temperature=0.0,
            extra_body={"prompt_logprobs": 0, "vllm_xargs": {"kv_policy": "none"}},
        )
        given = response.choices[0].prompt_logprobs[len(prompt.split()) :]  # type: ignore[attr-defined]
        each = [next(iter(token.values()))["logprob"] for token in given]
        return -sum(each) / len(each)

    return list(await asyncio.gather(*(one(*pair) for pair in texts)))
