# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The settings' invariants: what is accepted, what is refused, and that the message teaches."""

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

from gkv_vllm.config import (
    ConfigError,
    KVPolicyConfig,
    RequestPolicy,
    blocks_for,
)

SERVER = KVPolicyConfig(
    policy="gkv", budget=1024, window=16, min_budget=256, max_budget=4096, policy_config={"a": 1}
)


def test_importing_the_settings_loads_neither_torch_nor_vllm():
    code = "import sys, gkv_vllm.config; print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_default_is_no_policy():
    assert not KVPolicyConfig().active
    assert not KVPolicyConfig.from_mapping(None).active
    assert not KVPolicyConfig.from_mapping("none").active
    assert not KVPolicyConfig.from_mapping({}).active


def test_a_string_is_short_for_the_policy():
    assert KVPolicyConfig.from_mapping("gkv") == KVPolicyConfig.from_mapping({"policy": "gkv"})


@pytest.mark.parametrize("config", [KVPolicyConfig(), SERVER], ids=["defaults", "all"])
def test_mapping_survives_json_and_back(config):
    mapping = json.loads(json.dumps(config.to_mapping()))
    assert KVPolicyConfig.from_mapping(mapping) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_settings_are_frozen_and_independent_of_the_callers_mapping():
    mine = {"alpha": [1]}
    config = KVPolicyConfig(policy="gkv", policy_config=mine)
    mine["alpha"].append(2)
    assert config.policy_config == {"alpha": [1]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 1


@pytest.mark.parametrize("setting", dataclasses.fields(KVPolicyConfig), ids=lambda s: s.name)
def test_every_setting_has_help(setting):
    assert len(setting.metadata["help"]) > 20


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("buget", "budget"),
        ("intervall", "interval"),
        ("kv_budget", "budget"),
        ("min-budget", "min_budget"),
        ("policy_confg", "policy_config"),
        ("protected", "protect"),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(key, near):
    with pytest.raises(ConfigError, match=f"unknown kv_policy key '{key}'; did you mean '{near}'"):
        KVPolicyConfig.from_mapping({key: 1})


@pytest.mark.parametrize("key", ["zzz", 1, None, ("a",)])
def test_unknown_key_lists_the_valid_ones(key):
    with pytest.raises(ConfigError, match="valid: budget, granularity, .*, window"):
        KVPolicyConfig.from_mapping({key: 1})


INTEGERS = ["budget", "interval", "window", "min_budget", "max_budget", "reserve_prompt"]


@pytest.mark.parametrize("key", INTEGERS)
@pytest.mark.parametrize("value", [True, False, "512", 512.0, 1.5, [512], {}, b"5"], ids=repr)
def test_whole_numbers_are_whole_numbers(key, value):
    with pytest.raises(ConfigError, match=f"kv_policy {key} must be a whole number, got .* type"):
        KVPolicyConfig.from_mapping({key: value})


@pytest.mark.parametrize("key", INTEGERS)
@pytest.mark.parametrize("value", [-1, 0])
def test_numbers_below_their_smallest_value_are_refused(key, value):
    if key == "reserve_prompt" and value == 0:
        assert KVPolicyConfig(reserve_prompt=0).reserved_prompt == 0
        return
    with pytest.raises(ConfigError, match=f"kv_policy {key}={value} must be at least"):
        KVPolicyConfig.from_mapping({key: value})


@pytest.mark.parametrize("key", ["budget", "interval", "window", "policy", "protect"])
def test_none_is_no_value_for_a_required_setting(key):
    with pytest.raises(ConfigError, match=f"kv_policy {key} must be"):
        KVPolicyConfig.from_mapping({key: None})


@pytest.mark.parametrize("key", ["min_budget", "max_budget", "reserve_prompt", "record_positions"])
def test_none_leaves_an_optional_setting_to_its_default(key):
    assert KVPolicyConfig.from_mapping({key: None}) == KVPolicyConfig()


@pytest.mark.parametrize(
    ("key", "value", "valid"),
    [
        ("granularity", "page", "token, block"),
        ("granularity", 1, "token, block"),
        ("scope", "heads", "head, layer, all"),
        ("layer_split", "even", "contiguous, interleaved"),
        ("impl", "hip", "auto, reference, cpu, triton, cuda"),
        ("protect", "all", "prompt, sinks, none"),
        ("protect", ["prompt"], "prompt, sinks, none"),
        ("protect", True, "prompt, sinks, none"),
        ("trigger", "pressure", "interval"),
    ],
)
def test_choices_are_named(key, value, valid):
    with pytest.raises(ConfigError, match=f"kv_policy {key} must be one of {valid}, got"):
        KVPolicyConfig.from_mapping({key: value})


@pytest.mark.parametrize("value", ["", 1, True, ["gkv"]])
def test_policy_is_a_name(value):
    with pytest.raises(ConfigError, match="kv_policy policy must be a name"):
        KVPolicyConfig.from_mapping({"policy": value})


@pytest.mark.parametrize("value", ["{}", [], 3, None])
def test_policy_config_is_an_object(value):
    with pytest.raises(ConfigError, match="kv_policy policy_config must be a JSON object"):
        KVPolicyConfig.from_mapping({"policy_config": value})


@pytest.mark.parametrize("value", [3, [], ("policy", "gkv"), True])
def test_the_whole_must_be_a_mapping_or_a_name(value):
    with pytest.raises(ConfigError, match="kv_policy must be a mapping"):
        KVPolicyConfig.from_mapping(value)


@pytest.mark.parametrize(
    ("raw", "numbers"),
    [
        ({"window": 65, "budget": 64}, "window=65 is larger than budget=64"),
        ({"min_budget": 65, "budget": 64}, "min_budget=65 is larger than budget=64"),
        ({"max_budget": 63, "budget": 64}, "max_budget=63 is smaller than budget=64"),
    ],
)
def test_impossible_combinations_are_refused_with_the_numbers(raw, numbers):
    with pytest.raises(ConfigError, match=numbers):
        KVPolicyConfig.from_mapping(raw)


@pytest.mark.parametrize("block_size", [1, 16, 32, 63, 128])
@pytest.mark.parametrize("window", [1, 15, 16, 17, 64])
def test_budget_holds_the_window_and_one_more_block(block_size, window):
    for budget in range(window, 3 * block_size + 2 * window):
        config = KVPolicyConfig(policy="gkv", budget=budget, window=window)
        if blocks_for(budget, block_size) >= 1 + blocks_for(window, block_size):
            config.check_block_size(block_size)
        else:
            with pytest.raises(ConfigError, match=f"budget={budget} .* raise budget to at least"):
                config.check_block_size(block_size)


def test_min_budget_holds_the_window_and_one_more_block():
    config = KVPolicyConfig(policy="gkv", budget=256, min_budget=17)
    config.check_block_size(16)
    with pytest.raises(ConfigError, match="min_budget=17 .* at least 33"):
        config.check_block_size(32)


@pytest.mark.parametrize("block_size", [1, 32, 128])
def test_smallest_budget_is_one_the_planner_can_keep(block_size):
    for budget in (257, 512, 2048):
        config = KVPolicyConfig(policy="gkv", budget=budget)
        least = config.smallest_budget(block_size)
        assert least <= budget
        dataclasses.replace(config, budget=least).check_block_size(block_size)


# --- one request ---------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [None, {}, {"top_secret": 1}, {"kvx": 2}])
def test_a_request_without_our_keys_gets_the_servers_settings(extra):
    assert SERVER.for_request(extra) == RequestPolicy(evict=True, budget=1024, protect="prompt")


def test_a_request_may_override_within_bounds():
    extra = {"kv_policy": "gkv", "kv_budget": 4096, "kv_protect": "sinks"}
    assert SERVER.for_request(extra) == RequestPolicy(evict=True, budget=4096, protect="sinks")
    assert SERVER.for_request({"kv_budget": 256}).budget == 256


def test_a_request_may_opt_out():
    assert not SERVER.for_request({"kv_policy": "none"}).evict


def test_without_a_policy_no_request_evicts():
    assert not KVPolicyConfig().for_request(None).evict


@pytest.mark.parametrize("key", ["kv_transfer_params", "kv_cache_report_mode"])
def test_keys_that_vllm_adds_itself_pass(key):
    assert SERVER.for_request({key: {"anything": 1}}) == SERVER.for_request(None)


def test_vllm_reads_no_further_kv_keys_from_a_request():
    """A key that vLLM starts to own must be let through."""
    import re
    from importlib.util import find_spec
    from pathlib import Path

    root = Path(find_spec("vllm").origin).parent
    named = re.compile(r"""extra_args(?:\.get\(|\[)\s*["'](kv_\w+)["']""")
    sources = [root / "v1" / "request.py", *root.glob("entrypoints/openai/**/*.py")]
    found = {key for path in sources for key in named.findall(path.read_text())}
    assert found == {"kv_transfer_params", "kv_cache_report_mode"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"kv_buget": 512}, "unknown request argument 'kv_buget'; did you mean 'kv_budget'"),
        ({"kv_window": 8}, "unknown request argument 'kv_window'.*valid: kv_budget, kv_policy"),
        (
            {"kv_policy": "snapkv"},
            "kv_policy must be 'none' or this server's policy 'gkv', got 'sn",
        ),
        ({"kv_policy": 1}, "kv_policy must be 'none' or this server's policy 'gkv', got 1"),
        ({"kv_policy": ["gkv"]}, "kv_policy must be 'none'"),
        ({"kv_policy": None}, "kv_policy must be 'none'"),
        ({"kv_budget": "512"}, "kv_budget must be a whole number, got '512' of type str"),
        ({"kv_budget": 512.0}, "kv_budget must be a whole number"),
        ({"kv_budget": True}, "kv_budget must be a whole number"),
        ({"kv_budget": None}, "kv_budget must be a whole number"),
        ({"kv_budget": 255}, "kv_budget=255 is below this server's smallest budget of 256 tokens"),
        ({"kv_budget": -1}, "kv_budget=-1 is below"),
        ({"kv_budget": 4097}, "kv_budget=4097 is above this server's largest budget of 4096"),
        ({"kv_protect": "all"}, "kv_protect must be one of prompt, sinks, none, got 'all'"),
        ({"kv_protect": 0}, "kv_protect must be one of"),
        ({"kv_policy": "none", "kv_budget": 1}, "kv_budget=1 is below"),
        ({"kv_record": 1}, "kv_record=1, but this server records nothing; start it with --kv-rec"),
        ({"kv_record": "1"}, "kv_record must be 1 or 0, got '1' of type str"),
        ({"kv_record": 2}, "kv_record must be 1 or 0, got 2"),
        ({"kv_record": None}, "kv_record must be 1 or 0"),
    ],
    ids=str,
)
def test_bad_request_values_are_refused_with_a_sentence(extra, message):
    with pytest.raises(ConfigError, match=message):
        SERVER.for_request(extra)


def test_a_request_is_recorded_only_where_it_asks():
    server = dataclasses.replace(SERVER, record_positions="records")
    assert server.for_request({"kv_record": 1}).record is True
    for extra in ({}, {"kv_record": 0}, {"kv_policy": "none"}):
        assert server.for_request(extra).record is False
    assert SERVER.for_request({"kv_record": 0}).record is False


@pytest.mark.parametrize("value", ["", 1, True, ["records"]])
def test_the_folder_of_records_is_a_folder(value):
    with pytest.raises(ConfigError, match="kv_policy record_positions must be a folder, got"):
        KVPolicyConfig.from_mapping({"record_positions": value})


def test_without_max_budget_a_request_may_ask_for_any():
    assert KVPolicyConfig(policy="gkv").for_request({"kv_budget": 10**9}).budget == 10**9


def test_default_smallest_request_budget_grows_with_the_block():
    config = KVPolicyConfig(policy="gkv", budget=256, window=16)
    assert config.for_request({"kv_budget": 64}, block_size=32).budget == 64
    with pytest.raises(ConfigError, match="smallest budget of 129 tokens"):
        config.for_request({"kv_budget": 64}, block_size=128)
