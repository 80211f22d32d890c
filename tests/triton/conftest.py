# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Where the kernels under test run: compiled on a GPU (`-m gpu`), or in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available()
# Triton's decorators, those of its own functions too, read the variable when they are imported.
CAN_RUN = ON_GPU or "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1"
if CAN_RUN and not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ON_GPU and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not CAN_RUN:
        pytest.fail(
            "triton was imported before it could be told to interpret; run tests/triton in a "
            "process of its own, or all tests with TRITON_INTERPRET=1"
        )
    return torch.device("cuda" if ON_GPU else "cpu")
