# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What an evaluation runs: servers, and for each the cells that per-request overrides can reach."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from gkv_vllm.config import NO_POLICY, ConfigError, KVPolicyConfig, unknown_key
from gkv_vllm.eval.exams import EXAMS, PROCESSOR
from gkv_vllm.policies import registry


@dataclass(frozen=True)
class ServerPlan:
    """One server: what a request cannot change."""

    label: str
    kv_policy: Mapping[str, Any]
    """Everything of `--kv-*` but budgets and protection."""
    block_size: int
    cells: tuple[Cell, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The KV policy's settings, with room for every budget that its requests ask for."""
        budgets = [cell.budget for cell in self.cells if cell.budget is not None]
        return {**self.kv_policy, "budget": max(budgets), "min_budget": min(budgets)}

    def arguments(self, plan: Plan, records: Path) -> list[str]:
        """Flags of `vllm serve`; records go to the folder `records`, if the plan wants any."""
        settings = {
            **self.settings,
            "reserve_prompt": plan.length,
            **({"record_positions": str(records.resolve())} if plan.record else {}),
        }
        return [
            "--enforce-eager",
            "--dtype", plan.dtype,
            "--block-size", str(self.block_size),
            "--max-model-len", str(plan.length),
            "--max-num-seqs", str(plan.concurrency),
            # Chunked prompts with a seed end stock vLLM on a CPU: let all prompts fit one step.
            "--max-num-batched-tokens", str(plan.concurrency * plan.length),
            "--num-gpu-blocks-override",
            str(plan.concurrency * (plan.length // self.block_size + 2) + 1),
            "--logits-processors", PROCESSOR,
            "--additional-config", json.dumps({"kv_policy": settings}),
        ]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One exam under one setting: what is compared. `budget` None: nothing is evicted."""

    server: str
    exam: str
    budget: int | None
    protect: str

    @property
    def name(self) -> str:
        """The folder of its results."""
        if self.budget is None:
            return f"{self.exam}__full"
        return f"{self.exam}__{self.server}__b{self.budget}__{self.protect}"

    @property
    def xargs(self) -> dict[str, Any]:
        """What its requests carry as `vllm_xargs`."""
        if self.budget is None:
            return {"kv_policy": NO_POLICY}
        return {"kv_budget": self.budget, "kv_protect": self.protect}


@dataclass(frozen=True)
class Plan:
    """All of an evaluation, as its YAML file says."""

    model: str
    servers: Mapping[str, Mapping[str, Any]]
    """Label -> settings; `budgets`, `protect`, `exams`, `block_size` in one replace the plan's."""
    exams: tuple[str, ...]
    budgets: tuple[int, ...]
    protect: tuple[str, ...] = ("none",)
    length: int = 1024
    samples: int = 32
    first_seed: int = 10_000
    concurrency: int = 32
    block_size: int = 32
    dtype: str = "bfloat16"
    record: int = 0
    """So many texts of each cell are recorded, for the pages of `python -m gkv_vllm.view`."""
    common: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all servers."""

    def __post_init__(self) -> None:
        self._check_types()
        for server in self.server_plans():  # raises for what no server would take
            self._check_server(server)

    def _check_types(self) -> None:
        for name in ("length", "samples", "first_seed", "concurrency", "block_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number above 0, got {value!r}")
        if isinstance(self.record, bool) or not isinstance(self.record, int) or self.record < 0:
            raise ConfigError(f"record must be a whole number, 0 or more, got {self.record!r}")
        for name, kind in (("exams", str), ("budgets", int), ("protect", str)):
            _check_list(name, getattr(self, name), kind)
        if not isinstance(self.servers, Mapping) or not self.servers:
            raise ConfigError("servers must map a label to settings, for at least one server")
        for label, settings in self.servers.items():
            if not re.fullmatch(r"[\w.-]+", str(label)):
                raise ConfigError(
                    f"server {label!r}: a label has letters, digits, '_', '.' and '-'"
                )
            if not isinstance(settings, Mapping):
                raise ConfigError(f"server {label!r} must be a mapping of settings")
            for name, kind in (("exams", str), ("budgets", int), ("protect", str)):
                if name in settings:
                    _check_list(f"server {label!r}: {name}", settings[name], kind)

    def _check_server(self, server: ServerPlan) -> None:
        config = KVPolicyConfig.from_mapping(server.settings)
        if not config.active:
            raise ConfigError(f"server {server.label!r} names no policy")
        registry.create(config.policy, config.policy_config)
        config.check_block_size(server.block_size)
        for cell in server.cells:
            config.for_request(cell.xargs, server.block_size)
            if cell.exam not in EXAMS:
                raise ConfigError(unknown_key("exam", cell.exam, EXAMS))

    def server_plans(self) -> Iterator[ServerPlan]:
        """The servers in the order of the file; the first also runs without eviction."""
        own = ("budgets", "protect", "exams", "block_size")
        full_exams: list[str] = list(self.exams)
        for label, settings in self.servers.items():
            policy = {**self.common, **{k: v for k, v in settings.items() if k not in own}}
            exams = settings.get("exams", self.exams)
            budgets = settings.get("budgets", self.budgets)
            protect = settings.get("protect", self.protect)
            cells = [Cell(label, exam, None, "") for exam in full_exams]
            full_exams = []
            cells += [Cell(label, *parts) for parts in product(exams, budgets, protect)]
            yield ServerPlan(
                label, policy, settings.get("block_size", self.block_size), tuple(cells)
            )

    @classmethod
    def read(cls, path: Path) -> Plan:
        """A plan from YAML; ConfigError names a key that is not known."""
        import yaml

        try:
            raw = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        valid = {f.name for f in fields(cls)}
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} must map settings to values; valid: {', '.join(valid)}")
        for key in raw:
            if key not in valid:
                raise ConfigError(unknown_key("key of an evaluation plan", key, valid))
        if lacking := [key for key in ("model", "servers", "exams", "budgets") if key not in raw]:
            raise ConfigError(f"{path} lacks {', '.join(lacking)}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()
        }
        return cls(**values)


def _check_list(name: str, values: Any, kind: type) -> None:
    right = isinstance(values, list | tuple) and values
    if not right or not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
        raise ConfigError(f"{name} must be a list of at least one {kind.__name__}, got {values!r}")
