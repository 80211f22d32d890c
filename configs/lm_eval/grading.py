# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What lm-evaluation-harness calls to grade one text; the rules are the tasks' own."""

from __future__ import annotations

from typing import Any

from gkv_vllm.eval.tasks import TASKS


def grade(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`process_results` of the tasks in this folder: the text's metrics."""
    prompt = doc["prompt"].split()
    graded = TASKS[doc["task"]].grade(prompt + results[0].split(), len(prompt))
    return {"accuracy": graded.accuracy, "all_right": float(graded.all_right)}
