# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""From a flag to a `VllmConfig`: any argument order, any source, inert without a policy."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from gkv_vllm import compat, plugin, request_check
from gkv_vllm.config import ConfigError, KVPolicyConfig
from gkv_vllm.refusals import PolicyRefused

FRONT_END = [
    compat.ADD_CLI_ARGS,
    compat.PARSE_ARGS,
    compat.FROM_CLI_ARGS,
    compat.CREATE_ENGINE_CONFIG,
]
CONFIGS = Path(__file__).parents[1] / "configs"
ON_ACTIVATION = [
    compat.PROCESS_INPUTS,
    compat.GENERATE,
    compat.RESPONSES,
    compat.MANAGER_INIT,
    compat.RECORD,
]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Offline, vLLM looks for the default model's snapshot; most tests here name no model."""
    monkeypatch.setattr("vllm.engine.arg_utils.get_model_path", lambda model, revision: model)


@pytest.fixture(scope="module")
def parser():
    plugin.register()
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))


@pytest.fixture
def engine_args(parser):
    """Arguments of `vllm serve` -> EngineArgs."""
    return lambda *argv: AsyncEngineArgs.from_cli_args(parser.parse_args(list(argv)))


@pytest.fixture
def no_activation_left():
    """Undo what activation wraps, before and after: tests must not lean on each other."""
    for target in ON_ACTIVATION:
        compat.unwrap(target)
    yield
    for target in ON_ACTIVATION:
        compat.unwrap(target)


def policy_of(args):
    return (args.additional_config or {}).get("kv_policy")


# --- registration --------------------------------------------------------------------------------


def test_registering_again_changes_nothing():
    plugin.register()
    before = [compat.resolve(target)[2] for target in FRONT_END]
    plugin.register()
    assert [compat.resolve(target)[2] for target in FRONT_END] == before


def test_registering_is_cheap():
    """Under 50 ms beside vLLM's own imports, torch already loaded."""
    code = (
        "import vllm.engine.arg_utils, time; t = time.perf_counter();"
        "import gkv_vllm.plugin; gkv_vllm.plugin.register(); print(time.perf_counter() - t)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 0.05


def test_vllm_loads_the_plugin_by_itself():
    code = (
        "from vllm.engine.arg_utils import AsyncEngineArgs as A;"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser as P;"
        "print(A.add_cli_args(P()).parse_args(['--kv-policy', 'gkv']).kv_policy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "gkv"


# --- inert without a policy ----------------------------------------------------------------------


def stock(function_of):
    """Run with vLLM's own functions in place of our wrappers."""
    for target in FRONT_END:
        compat.unwrap(target)
    try:
        return function_of()
    finally:
        plugin.register()


def test_without_flags_engine_args_equal_stock_field_by_field(parser, demo_model):
    argv = ["--model", str(demo_model), "--additional-config", '{"mine": 1}']
    args = parser.parse_args(argv)
    ours = AsyncEngineArgs.from_cli_args(args)
    theirs = stock(lambda: AsyncEngineArgs.from_cli_args(args))
    for field in dataclasses.fields(AsyncEngineArgs):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert vars(ours).keys() == vars(theirs).keys()
    assert ours.additional_config is args.additional_config


def test_flags_add_no_dest_that_vllm_has(parser):
    taken = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    ours = {"kv_" + setting.name for setting in dataclasses.fields(KVPolicyConfig)}
    assert not taken & ours


@pytest.mark.parametrize("kv_policy", [None, "none", {"policy": "none", "budget": 64}], ids=str)
def test_without_a_policy_the_config_is_stock(kv_policy, demo_model, no_activation_left):
    extra = {} if kv_policy is None else {"kv_policy": kv_policy}
    make = lambda: EngineArgs(  # noqa: E731
        model=str(demo_model), additional_config=dict(extra), max_model_len=256
    ).create_engine_config()
    ours, theirs = make(), stock(make)
    assert ours.scheduler_config == theirs.scheduler_config
    assert ours.parallel_config.worker_cls == theirs.parallel_config.worker_cls
    assert ours.cache_config == theirs.cache_config
    assert ours.additional_config == extra
    assert not any(map(compat.wrapped, ON_ACTIVATION))


# --- flags ---------------------------------------------------------------------------------------

FLAGS = [
    ["--kv-policy", "gkv"],
    ["--kv-budget", "512"],
    ["--kv-policy-config", '{"alpha": 0.5}'],
    ["--additional-config", '{"mine": 1, "kv_policy": {"policy": "recency", "window": 8}}'],
    ["--max-model-len", "512"],
]
MERGED = {
    "mine": 1,
    "kv_policy": {
        "policy": "gkv",
        "budget": 512,
        "window": 8,
        "policy_config": {"alpha": 0.5},
    },
}


def test_every_argument_order_gives_the_same_config(engine_args):
    for order in itertools.permutations(FLAGS):
        assert engine_args(*itertools.chain(*order)).additional_config == MERGED


def test_merging_again_gives_the_same_and_leaves_the_users_mapping_alone():
    mine = {"kv_policy": {"policy": "recency", "window": 8}}
    merged = plugin.merge(mine, {"policy": "gkv"})
    assert merged == {"kv_policy": {"policy": "gkv", "window": 8}}
    assert plugin.merge(merged, {"policy": "gkv"}) == merged
    assert mine == {"kv_policy": {"policy": "recency", "window": 8}}


def test_a_spawned_api_server_sees_the_flags(parser):
    """It gets the parsed arguments, and vLLM's own from_cli_args runs before plugins load."""
    args = parser.parse_args(list(itertools.chain(*FLAGS)))
    assert stock(lambda: AsyncEngineArgs.from_cli_args(args)).additional_config == MERGED


def test_engine_args_stay_what_vllm_made_them(engine_args):
    """`vllm bench` builds its engine from vars(engine_args)."""
    ours = engine_args("--kv-policy", "gkv")
    again = type(ours)(**vars(ours))
    assert again.additional_config == ours.additional_config


def test_every_setting_has_a_flag(engine_args):
    given = {
        "policy": "gkv",
        "budget": 512,
        "interval": 64,
        "window": 8,
        "granularity": "token",
        "scope": "layer",
        "layer_groups": 1,
        "layer_split": "interleaved",
        "protect": "sinks",
        "trigger": "interval",
        "min_budget": 128,
        "max_budget": 1024,
        "reserve_prompt": 100,
        "impl": "reference",
        "record_positions": "records",
        "policy_config": {"alpha": 0.5},
    }
    assert given.keys() == {setting.name for setting in dataclasses.fields(KVPolicyConfig)}
    argv = []
    for name, value in given.items():
        shown = json.dumps(value) if isinstance(value, dict) else str(value)
        argv += [plugin.flag_name(name), shown]
    assert policy_of(engine_args(*argv)) == given


def test_a_flag_wins_even_when_it_repeats_the_default(engine_args):
    """Explicit is explicit: 2048 is the default, but the user wrote it."""
    argv = ["--additional-config", '{"kv_policy": {"policy": "gkv", "budget": 64}}']
    assert policy_of(engine_args(*argv, "--kv-budget", "2048"))["budget"] == 2048


def test_a_policys_name_is_enough_in_additional_config(engine_args):
    argv = ["--additional-config", '{"kv_policy": "gkv"}', "--kv-window", "8"]
    assert policy_of(engine_args(*argv)) == {"policy": "gkv", "window": 8}


@pytest.mark.parametrize("spelling", ["--kv_budget", "--kv-budget"])
def test_underscores_and_dotted_json_work_as_with_vllms_flags(spelling, engine_args):
    args = engine_args("--kv-policy=gkv", spelling, "64", "--kv-policy-config.alpha", "0.25")
    assert policy_of(args) == {"policy": "gkv", "budget": 64, "policy_config": {"alpha": 0.25}}


YAMLS = {
    "flags": "kv-policy: gkv\nkv-budget: 512\nkv-policy-config:\n  alpha: 0.5\n",
    "json": "kv-policy: gkv\nkv-budget: 512\nkv-policy-config: '{\"alpha\": 0.5}'\n",
    "underscores": "kv_policy: gkv\nkv_budget: 512\nkv_policy_config: {alpha: 0.5}\n",
    "additional": "additional-config:\n  kv_policy: {policy: gkv, budget: 512, "
    "policy_config: {alpha: 0.5}}\n",
}


@pytest.mark.parametrize("form", YAMLS)
def test_yaml_gives_what_the_flags_give(form, engine_args, tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(YAMLS[form])
    args = engine_args("--config", str(path))
    assert policy_of(args) == {"policy": "gkv", "budget": 512, "policy_config": {"alpha": 0.5}}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("serve/*.yaml")), ids=lambda path: path.stem)
def test_the_configs_we_ship_are_read(engine_args, path):
    config = plugin.read_config(engine_args("--config", str(path)).additional_config)
    assert config.active
    config.check_block_size(128)


def test_a_flag_wins_over_yaml_on_either_side(engine_args, tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(YAMLS["flags"])
    for argv in (["--kv-budget", "64", "--config", path], ["--config", path, "--kv-budget", "64"]):
        assert policy_of(engine_args(*map(str, argv)))["budget"] == 64


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--kv-budget", "many"], "argument --kv-budget: invalid int value: 'many'"),
        (["--kv-budget", "512.0"], "argument --kv-budget: invalid int value"),
        (["--kv-protect", "all"], "argument --kv-protect: invalid choice: 'all'"),
        (["--kv-granularity", "page"], "argument --kv-granularity: invalid choice"),
        (["--kv-trigger", "pressure"], "argument --kv-trigger: invalid choice"),
        (["--kv-policy-config", "[1]"], "'[1]' is not a JSON object"),
        (["--kv-policy-config", "{alpha"], "'{alpha' is not JSON"),
    ],
)
def test_argparse_refuses_ill_typed_flags(argv, says, engine_args, capsys):
    with pytest.raises(SystemExit):
        engine_args("--kv-policy", "gkv", *argv)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--kv-policy", "gkv", "--kv-window", "64", "--kv-budget", "32"], "window=64 is larger"),
        (["--kv-policy", "gkv", "--kv-budget", "0"], "budget=0 must be at least 1"),
        (["--kv-budget", "512"], "settings (budget) but no policy"),
        (["--additional-config", '{"kv_policy": {"buget": 1}}'], "did you mean 'budget'"),
        (["--additional-config", '{"kv_policy": 3}'], "kv_policy must be a mapping"),
        (["--additional-config", '{"kv_policy": 3}', "--kv-window", "8"], "must be a mapping"),
    ],
)
def test_bad_settings_end_the_command_with_one_sentence(argv, says, engine_args):
    with pytest.raises(SystemExit) as exit_:
        engine_args(*argv)
    assert isinstance(exit_.value.code, str), "a string exit code means stderr and status 1"
    assert says in exit_.value.code
    assert exit_.value.code.startswith("gkv_vllm: error: ") and "\n" not in exit_.value.code
    assert exit_.value.__suppress_context__


# --- activation ----------------------------------------------------------------------------------

SMALL = dict(max_model_len=512, block_size=32, num_gpu_blocks_override=64)


def llm_config(demo_model, kv_policy, **engine):
    """What LLM(model, additional_config=...) builds."""
    args = EngineArgs(
        model=str(demo_model), additional_config={"kv_policy": kv_policy}, **(SMALL | engine)
    )
    return args, args.create_engine_config()


@pytest.fixture
def active(demo_model, no_activation_left):
    _, config = llm_config(demo_model, {"policy": "gkv", "budget": 128, "max_budget": 256})
    return config


def test_activation_names_our_scheduler_and_worker(active):
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.cpu_worker import CPUWorker

    assert active.scheduler_config.scheduler_cls == plugin.SCHEDULER
    assert active.parallel_config.worker_cls == plugin.WORKERS["cpu"]
    assert issubclass(active.scheduler_config.get_scheduler_cls(), Scheduler)
    assert issubclass(compat.resolve(plugin.WORKERS["cpu"].replace(".GKV", ":GKV"))[2], CPUWorker)
    assert all(map(compat.wrapped, ON_ACTIVATION))


def test_activation_with_async_scheduling_keeps_it(active):
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    # The CPU platform turns it off; a platform that leaves it on gets the asynchronous one.
    active.scheduler_config.scheduler_cls = None
    active.parallel_config.worker_cls = "vllm.v1.worker.cpu_worker.CPUWorker"
    active.scheduler_config.async_scheduling = True
    plugin.activate(active)
    assert active.scheduler_config.scheduler_cls == plugin.ASYNC_SCHEDULER
    assert issubclass(active.scheduler_config.get_scheduler_cls(), AsyncScheduler)


def test_the_config_carries_every_setting_and_the_callers_dict_stays(
    demo_model, no_activation_left
):
    mine = {"policy": "gkv", "budget": 128}
    args, config = llm_config(demo_model, mine)
    carried = config.additional_config["kv_policy"]
    assert carried == KVPolicyConfig.from_mapping(mine).to_mapping()
    assert args.additional_config == {"kv_policy": mine}
    # A second config of the same arguments is the same again.
    assert args.create_engine_config().additional_config == config.additional_config


@pytest.mark.parametrize(
    ("kv_policy", "says"),
    [
        ({"policy": "gvk"}, "unknown kv policy 'gvk'; did you mean 'gkv'"),
        ({"policy": "gkv", "policy_config": {"alhpa": 1}}, "did you mean 'alpha'"),
        ({"policy": "gkv", "policy_config": {"alpha": "x"}}, "alpha"),
        ({"policy": "gkv", "budget": 32}, "budget=32 fits in 1 block"),
        ({"policy": "gkv", "budget": 2048}, "take 68 blocks of 32 tokens, but the KV cache has 63"),
        ({"policy": "gkv", "buget": 2048}, "did you mean 'budget'"),
        ({"policy": "gkv", "layer_groups": 2}, "layer_groups=2 is for block granularity"),
        (
            {"policy": "gkv", "budget": 128, "granularity": "block", "layer_groups": 5},
            "layer_groups=5, but the model has 4 layers",
        ),
        (
            {"policy": "gkv", "budget": 900, "granularity": "block", "layer_groups": 2},
            "take 66 blocks of 32 tokens in 2 KV cache groups, but the KV cache has 63",
        ),
        ({"budget": 128}, "no policy"),
    ],
    ids=str,
)
def test_bad_settings_from_python_raise_the_same_sentence(
    kv_policy, says, demo_model, no_activation_left
):
    with pytest.raises((ConfigError, PolicyRefused)) as error:
        llm_config(demo_model, kv_policy)
    assert says in str(error.value)
    assert not any(map(compat.wrapped, ON_ACTIVATION))


def test_layer_groups_need_the_hybrid_kv_cache_manager(demo_model, no_activation_left):
    policy = {"policy": "gkv", "budget": 128, "granularity": "block", "layer_groups": 2}
    with pytest.raises(PolicyRefused, match="remove --disable-hybrid-kv-cache-manager"):
        llm_config(demo_model, policy, disable_hybrid_kv_cache_manager=True)


def test_operators_that_are_not_there_are_refused_by_name(
    demo_model, no_activation_left, monkeypatch
):
    monkeypatch.setitem(sys.modules, "gkv_vllm.ops.cpu", None)  # as if it could not be imported
    policy = {"policy": "gkv", "budget": 128}
    assert llm_config(demo_model, {**policy, "impl": "auto"})
    with pytest.raises(PolicyRefused, match="impl=cpu, but the C\\+\\+ operators are not there"):
        llm_config(demo_model, {**policy, "impl": "cpu"})


def test_records_need_a_folder_that_can_be_written(demo_model, no_activation_left, tmp_path):
    policy = {"policy": "gkv", "budget": 128}
    new = tmp_path / "not" / "there"
    assert llm_config(demo_model, {**policy, "record_positions": str(new)})
    assert not new.exists(), "checking a command line must leave nothing behind"
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below"):
        with pytest.raises(PolicyRefused) as error:
            llm_config(demo_model, {**policy, "record_positions": str(path)})
        assert f"record_positions={path} is no folder that can be written" in str(error.value)
        assert "\n" not in str(error.value)


def test_records_of_one_rank_are_refused(demo_model, no_activation_left, tmp_path):
    policy = {"policy": "gkv", "budget": 128, "record_positions": str(tmp_path)}
    for form in ({"scope": "layer"}, {"scope": "all"}, {"granularity": "block"}):
        assert llm_config(demo_model, policy | form, tensor_parallel_size=2)
    with pytest.raises(PolicyRefused, match="a rank knows only its own heads; use --tensor-par"):
        llm_config(demo_model, policy, tensor_parallel_size=2)


def test_refusals_of_a_real_config_are_told_together(demo_model, no_activation_left):
    with pytest.raises(PolicyRefused) as error:
        llm_config(
            demo_model,
            {"policy": "gkv", "budget": 128},
            pipeline_parallel_size=2,
            kv_cache_dtype="fp8",
        )
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "pipeline parallelism of 2" in lines[0] and "'fp8'" in lines[1]


def test_on_a_command_line_refusals_exit_with_the_same_lines(engine_args, demo_model):
    args = engine_args(
        *("--model", str(demo_model), "--kv-policy", "gkv", "--max-model-len", "512"),
        *("--pipeline-parallel-size", "2", "--kv-cache-dtype", "fp8"),
    )
    with pytest.raises(SystemExit) as exit_:
        args.create_engine_config()
    lines = exit_.value.code.splitlines()
    assert len(lines) == 2 and all(line.startswith("gkv_vllm: error: ") for line in lines)


@pytest.mark.e2e
def test_a_refused_serve_prints_sentences_and_no_traceback(demo_model):
    argv = ["serve", str(demo_model), "--kv-policy", "gkv", "-pp", "2", "--max-model-len", "512"]
    done = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", *argv],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "gkv_vllm: error: a KV policy cannot run with pipeline parallelism of 2" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_the_version_is_checked_only_when_a_policy_is_asked_for(
    demo_model, no_activation_left, monkeypatch
):
    from gkv_vllm import refusals

    monkeypatch.setattr(refusals, "vllm_version", lambda: "0.31.0")
    llm_config(demo_model, "none")
    with pytest.raises(PolicyRefused, match=r"vLLM 0\.31\.0"):
        llm_config(demo_model, {"policy": "gkv", "budget": 128})


# --- requests ------------------------------------------------------------------------------------


def params(max_tokens=8, **extra):
    return SamplingParams(max_tokens=max_tokens, extra_args=extra or None)


def check(config, sampling_params, prompt_tokens=10):
    request_check.check_request(config, sampling_params, prompt_tokens=prompt_tokens)


@pytest.mark.parametrize(
    "extra",
    [{}, {"kv_budget": 256}, {"kv_policy": "none", "kv_protect": "sinks"}, {"session_id": "a"}],
    ids=str,
)
def test_good_requests_pass(extra, active):
    check(active, params(**extra))


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"kv_buget": 1}, "did you mean 'kv_budget'"),
        ({"kv_budget": 257}, "above this server's largest budget of 256"),
        ({"kv_budget": "128"}, "must be a whole number"),
        ({"kv_policy": "random"}, "must be 'none' or this server's policy 'gkv'"),
        ({"kv_protect": "everything"}, "must be one of prompt, sinks, none"),
    ],
)
def test_bad_requests_are_validation_errors(extra, says, active):
    with pytest.raises(VLLMValidationError, match=says):
        check(active, params(**extra))


def test_a_request_that_cannot_fit_is_refused_with_the_numbers(active):
    active.model_config.max_model_len = 100_000
    active.cache_config.num_gpu_blocks = 64
    check(active, params(max_tokens=63 * 32 - 10, kv_policy="none"))
    with pytest.raises(VLLMValidationError) as error:
        check(active, params(max_tokens=63 * 32 - 9, kv_policy="none"))
    for number in ("64 KV blocks of 32 tokens", "10 prompt tokens", "the server has 63"):
        assert number in str(error.value)


def test_nothing_is_refused_for_want_of_room_before_the_pool_is_known(active):
    active.cache_config.num_gpu_blocks = None
    check(active, params(max_tokens=10**6, kv_policy="none"))


@pytest.mark.parametrize(
    ("rank_local", "local_only", "blocks"),
    [(None, False, 49), (None, True, 99), (0, False, 199)],
    ids=["one client for all engines", "one client per node", "one process per engine"],
)
def test_vllm_reports_the_blocks_of_the_engines_a_client_manages(rank_local, local_only, blocks):
    parallel = SimpleNamespace(
        data_parallel_size=4,
        data_parallel_size_local=2,
        data_parallel_rank_local=rank_local,
        local_engines_only=local_only,
    )
    config = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=200), parallel_config=parallel
    )
    assert request_check.pool_blocks(config) == blocks


def test_requests_of_an_inactive_server_are_not_looked_at(demo_model):
    _, config = llm_config(demo_model, "none")
    check(config, params(kv_nonsense=1))


def test_generate_refuses_on_the_call_and_not_at_the_first_item(active):
    """A streaming response has begun by the first item."""
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = SimpleNamespace(vllm_config=active)
    with pytest.raises(VLLMValidationError, match="kv_buget"):
        AsyncLLM.generate(engine, "hi", params(kv_buget=1), "request")
    assert hasattr(AsyncLLM.generate(engine, "hi", params(), request_id="r"), "__anext__")


def test_responses_are_refused_on_the_call_too(active):
    from types import SimpleNamespace

    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses as Serving

    serving = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=active))
    ask = lambda p: Serving._generate_with_builtin_tools(  # noqa: E731
        serving, "r", engine_input={"prompt_token_ids": [1]}, sampling_params=p, context=None
    )
    with pytest.raises(VLLMValidationError, match="kv_buget"):
        ask(params(kv_buget=1))
    assert hasattr(ask(params()), "__anext__")


def test_process_inputs_refuses_bad_arguments_and_requests_that_cannot_fit(active):
    from vllm.v1.engine.input_processor import InputProcessor

    processor = InputProcessor(active)
    prompt = {"type": "token", "prompt_token_ids": list(range(1, 41))}
    ask = lambda p: processor.process_inputs("r", prompt, p, ("generate",))  # noqa: E731
    assert ask(params(kv_budget=200)).sampling_params.extra_args == {"kv_budget": 200}
    with pytest.raises(VLLMValidationError, match="kv_buget"):
        ask(params(kv_buget=1))
    active.cache_config.num_gpu_blocks = 4
    with pytest.raises(VLLMValidationError, match="40 prompt tokens, max_tokens=472"):
        ask(params(max_tokens=None))
