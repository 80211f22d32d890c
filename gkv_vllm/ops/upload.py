# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Brings small host lists to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(
    values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """These numbers on the device: [len(values)]. To a GPU from pinned memory, asynchronously.

    torch's allocator of pinned memory keeps the pages until the copy is done."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
