# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The EngineCore side: what is evicted, when, and how blocks return to the pool."""
