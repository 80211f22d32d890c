# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What eviction costs in answers: tasks, small models that solve them, and the harness."""
