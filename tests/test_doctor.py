# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The doctor finds what is wrong and only that; generated blocks equal their source."""

import importlib
import sys
import types
from functools import partial

import pytest
from vllm.platforms import current_platform

from gkv_vllm import __main__ as main
from gkv_vllm import compat, doctor, ops, refusals


def wrong(findings):
    return [finding.text for finding in findings if not finding.ok]


def command_line(*argv):
    return list(doctor.command_line(["vllm", "serve", *map(str, argv)]))


def test_a_sound_installation_has_no_problem(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    assert main.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "all is well" in out and "PROBLEM" not in out
    for line in ("gkv_vllm", "vllm 0.32", "EngineArgs.add_cli_args", "gkv: GKV(", "planner: 200"):
        assert line in out


def test_an_unsupported_vllm_is_a_problem(monkeypatch):
    monkeypatch.setattr(refusals, "vllm_version", lambda: "0.31.0")
    assert wrong(doctor.versions()) == ["vllm 0.31.0 (supported: >=0.32,<0.33)"]


def test_a_touch_that_moved_is_a_problem_and_sets_the_status(monkeypatch, capsys):
    gone = compat.Touch("vllm.engine.arg_utils:EngineArgs.no_such", "a reason", "an end")
    monkeypatch.setattr(compat, "TOUCHES", [gone])
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    assert len(wrong(doctor.touches())) == 1
    assert doctor.run() == 1
    assert "PROBLEM  vllm.engine.arg_utils:EngineArgs.no_such is gone" in capsys.readouterr().out


@pytest.fixture
def on(monkeypatch):
    """vLLM's platform names another type of device."""
    return partial(monkeypatch.setattr, current_platform, "device_type")


def test_operators_are_those_of_the_device_that_vllm_names(on, monkeypatch):
    (on_cpu,) = doctor.operators()
    assert on_cpu.ok and "CPU" in on_cpu.text
    on("cuda")
    monkeypatch.setitem(sys.modules, "gkv_vllm.ops.cuda", None)  # as if it could not be imported
    (triton,) = doctor.operators()
    assert triton.ok
    assert triton.text.startswith("operators on cuda: triton; CUDA C++ was not built")


@pytest.mark.parametrize(
    ("faster", "says"),
    [
        ([], "triton; CUDA C++ was built, but no measurement says that it is faster"),
        (["compact"], "triton, and CUDA C++ (sm_90a) for compact"),
    ],
)
def test_operators_on_a_gpu_are_those_that_were_measured(faster, says, on, monkeypatch):
    on("cuda")
    library = types.SimpleNamespace(architectures=lambda: "sm_90a")
    for name, module in (("_cuda", library), ("cuda", None)):
        monkeypatch.setitem(sys.modules, f"gkv_vllm.ops.{name}", module)
        monkeypatch.setattr(ops, name, module, raising=False)
    del sys.modules["gkv_vllm.ops.cuda"]  # imported anew, and gone with the test
    cuda = importlib.import_module("gkv_vllm.ops.cuda")
    monkeypatch.setattr(cuda, "measured_choice", lambda: faster)
    assert [finding.text for finding in doctor.operators()] == [f"operators on cuda: {says}"]


def test_a_gpu_without_triton_is_a_problem(on, monkeypatch):
    on("cuda")
    monkeypatch.setitem(sys.modules, "gkv_vllm.ops.triton", None)
    (text,) = wrong(doctor.operators())
    assert "none, since Triton is not there" in text


def test_a_device_without_operators_is_a_problem(on):
    on("xpu")
    assert wrong(doctor.operators()) == ["vLLM runs on xpu here; a KV policy needs cpu or cuda"]


def test_a_policy_that_does_not_load_is_a_problem(monkeypatch):
    from gkv_vllm.policies import registry

    monkeypatch.setattr(registry, "names", lambda: ["gkv", "nonsense"])
    (text,) = wrong(doctor.policies())
    assert text.startswith("nonsense: unknown kv policy")


def test_a_good_command_line(demo_model):
    (finding,) = command_line(demo_model, "--kv-policy", "gkv", "--max-model-len", "512")
    assert finding.ok and "policy='gkv'" in finding.text


def test_a_command_line_without_a_policy(demo_model):
    (finding,) = command_line(demo_model, "--max-model-len", "512")
    assert finding.ok and "does nothing" in finding.text


def test_all_refusals_of_a_command_line_are_told(demo_model):
    argv = ["--kv-policy", "gvk", "-pp", "2", "--kv-cache-dtype", "fp8", "--max-model-len", "512"]
    problems = wrong(command_line(demo_model, *argv))
    assert len(problems) == 3
    for text, says in zip(problems, ["of 2", "'fp8'", "did you mean 'gkv'"], strict=True):
        assert says in text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--kv-trigger", "never"], "invalid choice: 'never'"),
        (["--kv-budget", "8"], "window=16 is larger than budget=8"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--max-model-len", "999999999"], "vLLM itself refuses"),
    ],
)
def test_a_command_line_that_does_not_parse_is_a_problem(argv, says, demo_model):
    (text,) = wrong(command_line(demo_model, "--kv-policy", "gkv", *argv))
    assert says in text and "Traceback" not in text


def test_looking_at_a_command_line_activates_nothing(demo_model):
    compat.unwrap(compat.PROCESS_INPUTS)
    command_line(demo_model, "--kv-policy", "gkv", "--max-model-len", "512")
    assert not compat.wrapped(compat.PROCESS_INPUTS)


@pytest.mark.parametrize(
    ("target", "replacement"),
    [
        ("gkv_vllm.engine.planner.EvictionPlanner.evictions", lambda self: {}),
        ("gkv_vllm.ops.reference.local_scores", lambda q, k, *_: -k[..., :-4, 0]),
        ("gkv_vllm.ops.live_table.squeeze", lambda *a, **k: None),
    ],
)
def test_the_self_test_notices_a_broken_part(target, replacement, monkeypatch):
    assert wrong(doctor.self_test()) == []
    monkeypatch.setattr(target, replacement)
    assert wrong(doctor.self_test())


# --- generated blocks ----------------------------------------------------------------------------

SKELETON = """# Title
<!-- begin flags -->
<!-- end flags -->
between
<!-- begin policies -->
<!-- end policies -->
<!-- begin support -->
what stood there
<!-- end support -->
after
"""


def test_docs_fill_their_blocks_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(SKELETON)
    assert main.main(["docs", "--check", "--readme", str(readme)]) == 1
    assert readme.read_text() == SKELETON
    assert main.main(["docs", "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n<!-- begin flags -->\n| flag |")
    assert "<!-- end flags -->\nbetween\n<!-- begin policies -->\n| policy |" in text
    assert text.endswith("<!-- end support -->\nafter\n") and "what stood there" not in text
    assert main.main(["docs", "--check", "--readme", str(readme)]) == 0
    readme.write_text(text.replace("2048", "4096"))
    assert main.main(["docs", "--check", "--readme", str(readme)]) == 1


def test_docs_need_their_markers(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    assert main.main(["docs", "--readme", str(readme)]) == 1
    assert "<!-- begin flags -->" in capsys.readouterr().err


def test_the_flags_table_shows_defaults():
    table = main.flags_table()
    assert "| `--kv-budget` | `2048` | tokens kept" in table
    assert "| `--kv-policy-config` | `{}` |" in table
    assert {line.count("|") for line in table.splitlines()} == {4}


def test_the_readme_is_fresh(request):
    readme = request.config.rootpath / main.README
    if not readme.exists():
        pytest.skip("no README yet")
    assert main.docs(readme, check=True) == 0
