# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What our policies keep, against what kvpress keeps of the same prompts under the same model."""
