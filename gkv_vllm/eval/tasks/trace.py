# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Execution of a small program, line by line: its intermediate results are read again and again."""

from __future__ import annotations

import random

from gkv_vllm.eval.tasks.base import Answer, Document, Grade
from gkv_vllm.eval.vocabulary import DIGITS, LINES, NAMES, SETS

EXECUTED = 8
"""Words of an executed line: `@3 a? 3 f? 8 c= 1 ;`"""
LISTED = 5
"""Words of a line of the program: `@3 a f c ;`"""


class Trace:
    """`trace a= 3 ; f= 8 ; ... @7 c a b ; @3 a f c ; ... | @3 a? 3 f? 8 c= 1 ; @5 ...`

    A line `@n x y z` sets z to (x + y) mod 10. After line n comes line n + 1, or n + 2 when the
    result is odd; after line 63 comes line 0. They are listed in any order, and the prompt names
    the first. So which lines run, and how long ago a variable was
    last read or written, depends on the values. All of it follows from the prompt: greedy decoding
    is right.

    Answers are what was read, what was computed, and the words that name the line's variables. Ages
    of values count from where they were last written."""

    name = "trace"

    def draw(self, rng: random.Random, length: int) -> Document:
        count = min(len(NAMES), max(4, length // 16))
        names = rng.sample(NAMES, count)
        values = {name: rng.choice(DIGITS) for name in names}
        most = (length - 3 * count - 2) // (LISTED + EXECUTED * 2 // 3)
        size = min(len(LINES), max(3, most))
        start = rng.randrange(len(LINES))
        numbers = [(start + i) % len(LINES) for i in range(size)]
        program = {number: rng.choices(names, k=3) for number in numbers}

        document = Document()
        document.given("trace")
        for name in names:
            document.given(f"{name}=", values[name], ";")
        # In order, a model learns where a line stands instead of looking for its number.
        for number in rng.sample(numbers, len(numbers)):
            document.given(LINES[number], *program[number], ";")
        document.given("|")
        number = start
        while number in program and len(document.words) < length:
            left, right, target = program[number]
            result = (int(values[left]) + int(values[right])) % 10
            document.known(LINES[number])
            if not document.prompt:
                document.end_prompt()
            document.answer(f"{left}?", values[left], f"{right}?", values[right])
            values[target] = str(result)
            document.answer(f"{target}=", values[target])
            document.known(";")
            number = (number + 1 + result % 2) % len(LINES)
        return document

    def grade(self, words: list[str], prompt: int) -> Grade:
        program, values, seen = _program(words[: prompt - 1])
        answers: list[Answer] = []
        broken, at = 0, prompt - 1
        due: int | None = LINES.index(words[at])
        while at < len(words) and (due is None or due in program):
            number = LINES.index(words[at]) if words[at] in LINES else None
            following = _next_line(words, at + 1)
            said = words[at + 1 : min(at + EXECUTED - 1, following)]
            if number != due or number not in program:
                # The wrong line, or none: all its answers are wrong, and so is what it skipped.
                broken += 1
                count = max(1, round((following - at) / EXECUTED))
                answers += [
                    Answer(at + o, EXECUTED, False) for o in (2, 4, 6) for _ in range(count)
                ]
            else:
                _grade_line(said, at + 1, program[number], values, seen, answers)
            result = said[5] if len(said) == 6 and said[5] in DIGITS else None
            due = None
            if number is not None and result is not None:
                due = (number + 1 + int(result) % 2) % len(LINES)
            elif following < len(words):
                due = LINES.index(words[following])
            at = following
        owed = 3 * ((len(words) - prompt + 1) // EXECUTED) - len(answers)
        if due is None or due in program:  # a listing that ends may end the text as well
            answers += [Answer(len(words), EXECUTED, False)] * owed
        return Grade(answers, broken)


def _next_line(words: list[str], start: int) -> int:
    """Where the next line number stands; the end of the text where none does."""
    return next((at for at in range(start, len(words)) if words[at] in LINES), len(words))


def _program(
    words: list[str],
) -> tuple[dict[int, list[str]], dict[str, str], dict[str, int]]:
    """The lines of a prompt, the first values, and where they stand."""
    program, values, seen = {}, {}, {}
    for at, word in enumerate(words):
        if word in LINES:
            program[LINES.index(word)] = words[at + 1 : at + 4]
        elif word in SETS:
            values[word[0]], seen[word[0]] = words[at + 1], at + 1
    return program, values, seen


def _grade_line(
    said: list[str],
    first: int,
    line: list[str],
    values: dict[str, str],
    seen: dict[str, int],
    answers: list[Answer],
) -> None:
    """Append the answers of one executed line, by the values as the text itself has them."""
    shown = []
    for slot, name in enumerate(line[:2]):
        if len(said) <= 2 * slot + 1:
            return
        at = first + 2 * slot + 1
        right = said[2 * slot : 2 * slot + 2] == [f"{name}?", values[name]]
        answers.append(Answer(at, at - seen[name], right, words=2))
        seen[name] = at if right else seen[name]
        shown.append(said[2 * slot + 1])
    if len(said) < 6:
        return
    total = sum(map(int, shown)) % 10 if all(word in DIGITS for word in shown) else None
    answers.append(Answer(first + 5, 2, said[4:6] == [f"{line[2]}=", str(total)], words=2))
    if said[5] in DIGITS:
        values[line[2]], seen[line[2]] = said[5], first + 5
