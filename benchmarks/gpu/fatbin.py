# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Zeroes the device code of a shared object that one GPU architecture does not run; reads no file.

nvcc puts device code into the ELF section `.nv_fatbin`: fat binaries one after another, each a
header and entries, each entry a header (kind, sizes, architecture) and a payload: machine code or
PTX. Zeros compress to nothing, and since no offset changes the object loads as before."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

SECTION = b".nv_fatbin"
MAGIC = 0xBA55ED50
PTX, MACHINE_CODE = 1, 2
_FATBIN = struct.Struct("<IHHQ")  # magic, version, size of this header, size of what follows
_ENTRY = struct.Struct("<HHIQIIHHI")  # kind, _, size of this header, payload, _, _, _, _, sm
_ELF = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")


@dataclass(frozen=True)
class Entry:
    """One piece of device code: where its payload lies in the file, and what runs it."""

    kind: int
    architecture: int
    """Such as 90 for sm_90 and sm_90a."""
    start: int
    end: int


def entries(data: bytes) -> list[Entry]:
    """All device code of a 64-bit little-endian ELF file, in order; none without the section.

    ValueError when it is no such file, or its section does not hold what is described above."""
    return [entry for start, end in _sections(data) for entry in _entries(data, start, end)]


def keep_only(data: bytes, architecture: int) -> bytes:
    """The same file, of the same size, with the payloads for all other architectures zeroed.

    Machine code and PTX alike. ValueError as in `entries`, and when nothing would be left of the
    device code that was there."""
    found = entries(data)
    there = sorted({entry.architecture for entry in found})
    if found and architecture not in there:
        raise ValueError(f"no device code for sm_{architecture}, only for {there}")
    trimmed = bytearray(data)
    for entry in found:
        if entry.architecture != architecture:
            trimmed[entry.start : entry.end] = bytes(entry.end - entry.start)
    return bytes(trimmed)


def _sections(data: bytes) -> Iterator[tuple[int, int]]:
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    header = _ELF.unpack_from(data)
    table, size, count, names_at = header[6], header[11], header[12], header[13]
    headers = [_SECTION.unpack_from(data, table + i * size) for i in range(count)]
    if not headers:
        return
    names = headers[names_at][4]
    for name, _, _, _, offset, length, *_ in headers:
        start = names + name
        if data[start : data.index(b"\0", start)] == SECTION:
            yield offset, offset + length


def _entries(data: bytes, start: int, end: int) -> Iterator[Entry]:
    at = start
    while at < end:
        magic, _, header, size = _FATBIN.unpack_from(data, at)
        if magic == 0:  # fat binaries are aligned to 8 bytes
            at += 8
            continue
        if magic != MAGIC or at + header + size > end:
            raise ValueError(f"no fat binary at byte {at} of the file")
        entry, stop = at + header, at + header + size
        while entry < stop:
            kind, _, own, payload, _, _, _, _, architecture = _ENTRY.unpack_from(data, entry)
            if kind not in (PTX, MACHINE_CODE) or not own or entry + own + payload > stop:
                raise ValueError(f"no entry of a fat binary at byte {entry} of the file")
            yield Entry(kind, architecture, entry + own, entry + own + payload)
            entry += own + payload
        at = stop
