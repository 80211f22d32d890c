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
        broken = 0
        due: int | None = LINES.index(words[prompt - 1])
        """The line that must come; None when nobody can say."""
        for at in range(prompt - 1, len(words), EXECUTED):
            number = LINES.index(words[at]) if words[at] in LINES else None
            if due is not None and due not in program:
                break  # only some lines are listed, and the last of them was executed
            broken += number is None or due not in (None, number)
            if number not in program:  # nothing of this line can be right; the next may be
                answers += [Answer(at + offset, EXECUTED, False) for offset in (2, 4, 6)]
                due = None
                continue
            said = words[at + 1 : at + EXECUTED - 1]
            _grade_line(said, at + 1, program[number], values, seen, answers)
            odd = int(said[5]) % 2 if len(said) == 6 and said[5] in DIGITS else 0
            due = (number + 1 + odd) % len(LINES)
        return Grade([a for a in answers if a.position < len(words)], broken)


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
        answers.append(Answer(at, at - seen[name], right))
        seen[name] = at if right else seen[name]
        shown.append(said[2 * slot + 1])
    if len(said) < 6:
        return
    total = sum(map(int, shown)) % 10 if all(word in DIGITS for word in shown) else None
    answers.append(Answer(first + 5, 2, said[4:6] == [f"{line[2]}=", str(total)]))
    if said[5] in DIGITS:
        values[line[2]], seen[line[2]] = said[5], first + 5
