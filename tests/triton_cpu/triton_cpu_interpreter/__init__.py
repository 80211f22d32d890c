# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""A Triton backend for the CPU that compiles nothing: every kernel is interpreted."""
