# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""For tools that still look for a setup.py; all metadata stands in pyproject.toml."""

from setuptools import setup

setup()
