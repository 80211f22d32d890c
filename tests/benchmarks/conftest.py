# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Makes the benchmarks importable as they are when they run: `gpu.fatbin`, `machine`."""

from __future__ import annotations

import sys
from pathlib import Path

# Last, so that no module of the benchmarks hides another one.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
