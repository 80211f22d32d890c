# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""KV-cache eviction for long-running decodes, as a plugin for vLLM; only the version lives here."""

__version__ = "0.1.0"
