# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The worker side: applying a plan, keeping queries, scoring blocks."""
