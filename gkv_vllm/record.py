# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The file that holds what one request lost and when; who fills it is `engine/recorder.py`.

One zip archive per request, which `numpy.load` opens; docs/records.md describes its members.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "gkv_vllm record"
VERSION = 1
PART = ".part"
"""Ends the name of a file whose request still runs."""
_DAMAGE = (
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)
_ARRAYS = {"positions": np.int32, "scores": np.float32, "kept": np.bool_}


_ENDING = ("prompt_tokens", "preemptions", "finish", "truncated")


class RecordError(ValueError):
    """A file that is no record, or one that cannot be read; its message is one sentence."""


@dataclass(frozen=True)
class Header:
    """What is the same for all events of a request."""

    request_id: str
    model: str
    policy: str
    granularity: str
    scope: str
    protect: str
    budget: int
    interval: int
    window: int
    block_size: int
    layers: int
    kv_heads: int
    layer_groups: list[int]
    """The layer group of each layer."""

    @property
    def shape(self) -> tuple[int, int]:
        """How many kept sets an event has: the first two dimensions of its arrays."""
        if self.granularity == "block":
            return max(self.layer_groups) + 1, 1
        shapes = {"head": (self.layers, self.kv_heads), "layer": (self.layers, 1), "all": (1, 1)}
        return shapes[self.scope]

    def per_head(self, of_sets: np.ndarray) -> np.ndarray:
        """What `of_sets` [a, b, ...] says of each layer and head: [layers, kv_heads, ...]."""
        if self.granularity == "block":
            of_sets = of_sets[self.layer_groups]
        return np.broadcast_to(of_sets, (self.layers, self.kv_heads, *of_sets.shape[2:]))


@dataclass(eq=False)
class Event:
    """One eviction. Tokens below `protected` and from `recent` on did not compete and stayed."""

    number: int
    """How many evictions the request had had since it last started from its prompt."""
    epoch: int
    """How many times it had been preempted, and so had got back all that it had lost."""
    num_tokens: int
    """Tokens computed when it fell due."""
    protected: int
    recent: int
    positions: np.ndarray
    """[a, b, units] int32: who competed, oldest first. Positions of tokens, a x b being 1 x 1,
    layers x 1 or layers x KV heads by the scope; or the first position of each block, layer
    groups x 1."""
    scores: np.ndarray
    """[a, b, units] float32: higher means keep."""
    kept: np.ndarray
    """[a, b, units] bool"""

    @property
    def survivors(self) -> np.ndarray:
        """The positions that stayed: [a, b, kept] int32, equally many everywhere."""
        return self.positions[self.kept].reshape(*self.kept.shape[:2], -1)


@dataclass
class RecordWriter:
    """Writes one file while its request runs; `close` gives it its name."""

    folder: Path
    header: Header
    limit: int
    """Bytes after which events are left out."""
    truncated: bool = False
    _events: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = _free_name(self.folder, self.header.request_id)
        self._part = self.path.with_name(self.path.name + PART)
        self._zip = zipfile.ZipFile(self._part, "x", zipfile.ZIP_DEFLATED, compresslevel=1)

    def add(self, event: Event) -> None:
        """Append an event, unless the file has reached its limit: then none after it, either."""
        assert self._zip.fp is not None
        self.truncated |= self._zip.fp.tell() >= self.limit
        if self.truncated:
            return
        index = len(self._events)
        for name, dtype in _ARRAYS.items():
            self._array(f"events/{index}/{name}", getattr(event, name).astype(dtype, copy=False))
        numbers = {f.name: getattr(event, f.name) for f in fields(Event) if f.name not in _ARRAYS}
        self._events.append(numbers)

    def close(
        self, *, token_ids: np.ndarray, prompt_tokens: int, preemptions: int, finish: str
    ) -> None:
        """The request ended; `finish` says how."""
        self._array("token_ids", token_ids.astype(np.int32))
        about = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self.header),
            "prompt_tokens": prompt_tokens,
            "preemptions": preemptions,
            "finish": finish,
            "truncated": self.truncated,
            "events": self._events,
        }
        self._zip.writestr("record.json", json.dumps(about))
        self._zip.close()
        self._part.rename(self.path)

    def discard(self) -> None:
        """Leave nothing behind: the disk is full, say."""
        self._zip.fp = None  # closing would write once more
        self._part.unlink(missing_ok=True)

    def _array(self, name: str, array: np.ndarray) -> None:
        with self._zip.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, array, allow_pickle=False)


@dataclass(frozen=True)
class Record:
    """One file, opened. Events are read from disk as they are asked for."""

    path: Path
    header: Header
    prompt_tokens: int
    preemptions: int
    finish: str
    truncated: bool
    token_ids: np.ndarray
    _numbers: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self._numbers)

    def events(self) -> Iterator[Event]:
        with _opened(self.path) as archive:
            for index, numbers in enumerate(self._numbers):
                arrays = {name: _array(archive, f"events/{index}/{name}") for name in _ARRAYS}
                if len({array.shape for array in arrays.values()}) > 1:
                    raise RecordError(f"{self.path}: the arrays of event {index} do not fit")
                yield Event(**{**numbers, **arrays})


def read_record(path: Path) -> Record:
    """Open a record; RecordError says in one sentence why it is none."""
    with _opened(path) as archive:
        if "record.json" not in archive.files:
            raise RecordError(f"{path} is not a record of evictions: it has no record.json")
        about: dict[str, Any] = json.loads(archive["record.json"])
        if about.pop("format", None) != FORMAT:
            raise RecordError(f"{path} is not a record of evictions")
        if (version := about.pop("version", None)) != VERSION:
            raise RecordError(
                f"{path} has version {version} of the format, and this gkv_vllm reads version "
                f"{VERSION}; use the gkv_vllm that wrote it"
            )
        rest = {name: about.pop(name) for name in _ENDING}
        numbers = about.pop("events")
        return Record(
            path, Header(**about), **rest, token_ids=_array(archive, "token_ids"), _numbers=numbers
        )


def _array(archive: Any, name: str) -> np.ndarray:
    array = archive[name]
    if not isinstance(array, np.ndarray):  # numpy.load returns any other member as bytes
        raise ValueError(f"{name} is no array")
    return array


class _opened:
    """`numpy.load` of a record, whose many errors become one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            archive = np.load(self.path, allow_pickle=False)
        except FileNotFoundError:
            raise RecordError(f"there is no file {self.path}") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise RecordError(f"{self.path} is not a record of evictions ({error})") from None
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise RecordError(f"{self.path} is not a record of evictions: it holds one array")
        self._archive = archive
        return archive

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._archive.close()
        if isinstance(error, _DAMAGE) and not isinstance(error, RecordError):
            raise RecordError(f"{self.path} is damaged ({error})") from None


def folder_bytes(folder: Path) -> int:
    """What the records of a folder take, unfinished ones included."""
    return sum(path.stat().st_size for path in folder.glob("*.npz*"))


def _free_name(folder: Path, request_id: str) -> Path:
    """A name that tells the request, whatever characters its client put into the id."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", request_id).lstrip(".")[:120] or "request"
    names = (f"{stem}{suffix}.npz" for suffix in ("", *(f".{i}" for i in range(2, 10_000))))
    return next(
        folder / name
        for name in names
        if not (folder / name).exists() and not (folder / (name + PART)).exists()
    )
