# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Triton kernels over vLLM's paged KV cache, one kernel and its launcher per file.

Importable only as `gkv_vllm.triton_kernels`: vLLM looks for a top-level module of this name that is
not ours. Nothing here imports vLLM or the rest of the package."""
