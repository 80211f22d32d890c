# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Pictures of records: `python -m gkv_vllm.view`. Reads files, and knows nothing of the engine."""
