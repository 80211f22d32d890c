# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The tasks by name."""

from __future__ import annotations

from gkv_vllm.eval.tasks.base import Answer, Document, Grade, Task
from gkv_vllm.eval.tasks.copyback import Copyback
from gkv_vllm.eval.tasks.ledger import Ledger
from gkv_vllm.eval.tasks.once import Once
from gkv_vllm.eval.tasks.prose import Prose
from gkv_vllm.eval.tasks.trace import Trace

TASKS: dict[str, Task] = {
    task.name: task for task in (Ledger(), Once(), Trace(), Copyback(), Prose())
}

__all__ = ["TASKS", "Answer", "Document", "Grade", "Task"]
