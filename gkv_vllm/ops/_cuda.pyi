# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The compiled library of csrc/cuda: importing it implements `torch.ops.gkv` for CUDA."""

def architectures() -> str: ...
