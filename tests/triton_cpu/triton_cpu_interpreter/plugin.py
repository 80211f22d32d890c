# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Switches off the one Triton kernel of vLLM's sampler that the interpreter cannot run."""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in every process, before it loads a model."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
