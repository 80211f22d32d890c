# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The folders of an evaluation: one per cell, written whole or not at all."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from gkv_vllm.config import ConfigError
from gkv_vllm.eval.ask import Prediction
from gkv_vllm.eval.plan import Cell

PREDICTIONS, METRICS, CONFIG = "predictions.jsonl", "metrics.json", "config.json"
PLAN = "plan.yaml"


class Store:
    """Results under one folder: `CELL/predictions.jsonl`, `metrics.json`, `config.json`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, cell: str) -> bool:
        return (self.root / cell / METRICS).exists()

    def write(
        self,
        cell: str,
        predictions: Sequence[Prediction],
        metrics: dict[str, Any],
        config: dict[str, Any],
        records: Sequence[Path] = (),
    ) -> None:
        """`records` are moved into the cell, named after the seeds of the first predictions."""
        partial = self.root / f".{cell}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        lines = (json.dumps(prediction.as_json()) + "\n" for prediction in predictions)
        (partial / PREDICTIONS).write_text("".join(lines))
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (partial / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
        for prediction, record in zip(predictions, records, strict=False):
            record.rename(partial / f"{prediction.seed}.npz")
        shutil.rmtree(self.root / cell, ignore_errors=True)
        partial.rename(self.root / cell)

    def check(self, cell: Cell, asked: dict[str, Any]) -> None:
        """ConfigError if a cell that is here was measured with other settings than are asked."""
        stored = self.config(cell.name)
        if cell.budget is None:  # whoever ran it, nothing was evicted
            asked = {
                k: v for k, v in asked.items() if k not in ("server", "kv_policy", "block_size")
            }
        wrong = [key for key in asked if key in stored and stored[key] != asked[key]]
        if wrong:
            raise ConfigError(
                f"{self.root} holds {cell.name} with {wrong[0]}={stored[wrong[0]]!r}, the "
                f"plan says {asked[wrong[0]]!r}; name another --out folder"
            )

    def cells(self) -> list[str]:
        """The names of all cells that are there, sorted."""
        return sorted(path.parent.name for path in self.root.glob(f"*/{METRICS}"))

    def in_order(self) -> dict[str, dict[str, Any]]:
        """The config of each cell that is there, as the plan lists exams and servers; then what
        the plan does not name, and without one all, by name."""
        import yaml

        plan = self.root / PLAN
        text = plan.read_text() if plan.exists() else "{}"
        listed = yaml.safe_load(text)
        exams, servers = list(listed.get("exams", ())), list(listed.get("servers", ()))

        def place(item: tuple[str, dict[str, Any]]) -> tuple[int, int, str]:
            _, config = item
            exam, server = config["exam"], config["server"]
            return (
                exams.index(exam) if exam in exams else len(exams),
                servers.index(server) if server in servers else len(servers),
                item[0],
            )

        return dict(sorted(((name, self.config(name)) for name in self.cells()), key=place))

    def metrics(self, cell: str) -> dict[str, Any]:
        return json.loads((self.root / cell / METRICS).read_text())

    def config(self, cell: str) -> dict[str, Any]:
        return json.loads((self.root / cell / CONFIG).read_text())

    def predictions(self, cell: str) -> list[dict[str, Any]]:
        text = (self.root / cell / PREDICTIONS).read_text()
        return [json.loads(line) for line in text.splitlines()]

    def write_environment(self) -> None:
        """Versions and machine, once per folder."""
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / "environment.json"
        if not path.exists():
            path.write_text(json.dumps(environment(), indent=2) + "\n")


def environment() -> dict[str, Any]:
    """What the numbers were measured with."""
    versions = {}
    for name in ("gkv-vllm", "vllm", "torch", "transformers", "openai"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "versions": versions,
    }


def commit() -> str:
    """Of the code that is running, `-dirty` where it was changed since."""
    here = Path(__file__).parent
    ran = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return ran.stdout.strip() or "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
