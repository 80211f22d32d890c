# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Where the tests of the GPU suite run that vLLM's own Triton kernels take part in."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU, or a CPU whose Triton interprets (`tests/triton/test_gpu_suite.py` sets one up)."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        pytest.skip("no GPU, and no Triton backend for the CPU (tests/triton_cpu)")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Triton's interpreter multiplies bfloat16 matrices wrongly; a GPU has TF32 for float32."""
    if device.type == "cpu":
        return (torch.float32, torch.float16)
    return (torch.bfloat16, torch.float16)
