# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Small lists to the device and back without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """These numbers on the device: [len(values)]. To a GPU from pinned memory, asynchronously.

    torch's allocator of pinned memory keeps the pages until the copy is done."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def to_host(numbers: Tensor) -> np.ndarray:
    """The same numbers as an array on the host. From a GPU they arrive later, without a wait:
    whoever reads them must know that the stream has come so far."""
    if numbers.device.type == "cpu":
        return numbers.numpy()
    pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    return pinned.copy_(numbers, non_blocking=True).numpy()
