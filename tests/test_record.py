# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""What is no record is refused in one sentence, and docs/records.md names every member."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gkv_vllm
from gkv_vllm.record import Event, Header, RecordError, RecordWriter, read_record

DOCS = Path(gkv_vllm.__file__).parents[1] / "docs" / "records.md"
HEADER = Header(
    request_id="a",
    model="m",
    policy="gkv",
    granularity="token",
    scope="head",
    protect="none",
    budget=4,
    interval=4,
    window=2,
    block_size=4,
    layers=1,
    kv_heads=2,
    layer_groups=[0],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good record of one event."""
    writer = RecordWriter(tmp_path, HEADER, limit=1 << 20)
    kept = np.array([[[1, 0, 1], [0, 1, 1]]], dtype=bool)
    positions = np.array([[[0, 1, 2]] * 2], dtype=np.int32)
    writer.add(Event(0, 0, 5, 0, 3, positions, np.zeros((1, 2, 3), dtype=np.float32), kept))
    writer.close(token_ids=np.arange(6), prompt_tokens=2, preemptions=0, finish="stopped")
    return writer.path


def rewritten(path: Path, **changed: Any) -> Path:
    """The same record with members replaced; None leaves one out."""
    copy = path.with_name("changed.npz")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            key = name.removesuffix(".npy").replace("/", "_").replace(".", "_")
            data = changed.get(key, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return copy


def about(path: Path, **changed: Any) -> bytes:
    return json.dumps({**json.loads(np.load(path)["record.json"]), **changed}).encode()


def test_a_record_comes_back_as_it_was_written(path: Path) -> None:
    record = read_record(path)
    assert asdict(record.header) == asdict(HEADER)
    (event,) = record.events()
    assert event.survivors.tolist() == [[[0, 2], [1, 2]]]
    assert record.token_ids.tolist() == [*range(6)]


def test_what_is_no_record_is_refused_in_one_sentence(path: Path, tmp_path: Path) -> None:
    files = {
        "there is no file": tmp_path / "nothing.npz",
        "is not a record of evictions (": tmp_path / "text.npz",
        "it holds one array": tmp_path / "array.npy",
        "it has no record.json": tmp_path / "other.npz",
        "is not a record of evictions": rewritten(path, record_json=about(path, format="x")),
    }
    files["is not a record of evictions ("].write_text("hello")
    np.save(files["it holds one array"], np.zeros(3))
    np.savez(files["it has no record.json"], a=np.zeros(3))
    for says, file in files.items():
        with pytest.raises(RecordError) as error:
            read_record(file)
        assert says in str(error.value)
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)


def test_another_version_is_refused_with_both_numbers(path: Path) -> None:
    with pytest.raises(RecordError, match="has version 2 .* reads version 1"):
        read_record(rewritten(path, record_json=about(path, version=2)))


@pytest.mark.parametrize(
    "changed",
    [
        {"token_ids": None},
        {"token_ids": b"short"},
        {"record_json": b"{"},
        {"record_json": b'{"format": "gkv_vllm record", "version": 1}'},
        {"events_0_kept": None},
        {"events_0_scores": b"\x93NUMPY"},
    ],
    ids=str,
)
def test_a_damaged_record_is_refused(path: Path, changed: dict[str, Any]) -> None:
    damaged = rewritten(path, **changed)
    with pytest.raises(RecordError, match=r"changed\.npz is damaged"):
        list(read_record(damaged).events())


def test_arrays_that_do_not_fit_are_refused(path: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "kept.npy", np.zeros((1, 2, 9), dtype=bool))
    damaged = rewritten(path, events_0_kept=(tmp_path / "kept.npy").read_bytes())
    with pytest.raises(RecordError, match="arrays of event 0 do not fit"):
        list(read_record(damaged).events())


def test_reading_a_record_needs_neither_torch_nor_vllm() -> None:
    code = "import sys, gkv_vllm.record; print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_docs_name_every_member_of_the_file(path: Path) -> None:
    named = DOCS.read_text()
    keys = [*json.loads(np.load(path)["record.json"]), *(f.name for f in fields(Event))]
    assert [key for key in keys if f"`{key}`" not in named] == []
    for member in np.load(path).files:
        assert f"`{member.replace('/0/', '/N/')}`" in named
