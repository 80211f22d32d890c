# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Plans: what they list, and what they refuse before a server starts."""

import json
from pathlib import Path

import pytest

from gkv_vllm.config import ConfigError, KVPolicyConfig
from gkv_vllm.eval.plan import Plan

PLAN = {
    "model": "m",
    "servers": {"gkv": {"policy": "gkv"}, "blocks": {"policy": "gkv", "granularity": "block",
                                                     "exams": ["trace"], "block_size": 64}},
    "exams": ("ledger", "trace"),
    "budgets": (128, 256),
    "protect": ("none", "prompt"),
}  # fmt: skip


def test_full_cache_runs_once_and_every_combination_once():
    cells = [cell.name for server in Plan(**PLAN).server_plans() for cell in server.cells]
    assert len(cells) == len(set(cells)) == 2 + 8 + 4
    assert "ledger__full" in cells and "trace__blocks__b256__prompt" in cells
    assert "ledger__blocks__b256__prompt" not in cells


def test_a_server_takes_all_budgets_of_its_cells():
    plan = Plan(**PLAN)
    for server in plan.server_plans():
        arguments = server.arguments(plan, Path("records"))
        settings = json.loads(arguments[arguments.index("--additional-config") + 1])["kv_policy"]
        config = KVPolicyConfig.from_mapping(settings)
        config.check_block_size(server.block_size)
        for cell in server.cells:
            config.for_request(cell.xargs, server.block_size)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"exams": ("legder",)}, "did you mean 'ledger'"),
        ({"servers": {"x": {"polcy": "gkv"}}}, "did you mean 'policy'"),
        ({"servers": {"x": {"policy": "gkv", "window": 500}}}, "window=500 is larger"),
        ({"servers": {"x": {"policy": "gkv", "policy_config": {"alhpa": 1}}}}, "mean 'alpha'"),
        ({"servers": {"x": {"policy": "gkv", "protect": "prompt"}}}, "must be a list"),
        ({"servers": {"x": {"granularity": "block"}}}, "names no policy"),
        ({"servers": {"a/b": {"policy": "gkv"}}}, "a label has letters"),
        ({"servers": {}}, "at least one server"),
        ({"servers": ["gkv"]}, "must map a label"),
        ({"servers": {"x": "gkv"}}, "must be a mapping of settings"),
        ({"protect": ("promt",)}, "kv_protect must be one of"),
        ({"budgets": ()}, "at least one int"),
        ({"budgets": 256}, "must be a list"),
        ({"budgets": (-5, 256)}, "must be at least 1"),
        ({"samples": 0}, "above 0"),
        ({"length": "1024"}, "whole number"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Plan(**{**PLAN, **change})


def test_a_plan_is_read_from_yaml(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("model: m\nexams: [ledger]\nbudgets: [64]\nservers: {a: {policy: random}}\n")
    assert Plan.read(path).budgets == (64,)
    for text, sentence in {
        "": "must map settings",
        "model: [": "is not YAML",
        "model: m": "lacks servers, exams, budgets",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            Plan.read(path)
    path.write_text("model: m\nexam: [ledger]\n")
    with pytest.raises(ConfigError, match="did you mean 'exams'"):
        Plan.read(path)


PLANS = sorted((Path(__file__).parents[2] / "configs" / "eval").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_plans_of_the_repository_are_valid(path):
    assert list(Plan.read(path).server_plans())


def test_there_are_plans():
    assert len(PLANS) >= 6


def test_only_a_plan_that_wants_records_makes_servers_write_them(tmp_path):
    for record in (0, 2):
        plan = Plan(**{**PLAN, "record": record})
        settings = [server.arguments(plan, tmp_path)[-1] for server in plan.server_plans()]
        assert all((str(tmp_path) in text) == bool(record) for text in settings)
    with pytest.raises(ConfigError, match="record must be a whole number"):
        Plan(**{**PLAN, "record": -1})
