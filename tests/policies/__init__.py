# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Tests of the policies, over requests in a paged cache (`paged_requests`)."""
