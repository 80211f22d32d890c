# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Streams completions from a server and notes when their tokens arrive; knows no policy.

Plain asyncio and HTTP/1.1: a client library would take as long per token as a small step does."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

EVENT, DONE, LAST = b"data: ", b"data: [DONE]", b'"choices":[]'


class RequestFailed(RuntimeError):
    """The server refused a request, or broke off; the message holds what it said."""


@dataclass
class Completion:
    """One request: when it was sent, and when each of its events arrived."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int | None = None
    """What the server counted; None until the request is done."""

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring events."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


def body(model: str, prompt: list[int], tokens: int) -> bytes:
    """A completion of exactly so many tokens, greedy."""
    asked: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(asked).encode()


async def get(host: str, port: int, path: str) -> str:
    """The body of a GET request, unparsed: work in another thread would hold up the streams.

    RequestFailed where the answer is not 200, or has no length."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"^content-length: (\d+)", answer, re.MULTILINE)
        if " 200 " not in answer.partition("\r\n")[0] or length is None:
            raise RequestFailed(f"GET {path}: {answer}")
        return (await reader.readexactly(int(length[1]))).decode()
    finally:
        writer.close()


async def complete(host: str, port: int, content: bytes, completion: Completion) -> None:
    """Send one request and read its stream to the end, filling in `completion` on the way.

    RequestFailed where the server says no, or ends the stream early."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\n"
            b"Host: %b\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n" % (host.encode(), len(content))
        )
        writer.write(content)
        await writer.drain()
        status = await reader.readline()
        if b" 200 " not in status:
            said = (await reader.read(2000)).decode(errors="replace")
            raise RequestFailed(f"{status.decode().strip()}: {said}")
        async for line in reader:
            if not line.startswith(EVENT) or line.startswith(DONE):
                continue
            if LAST in line:
                completion.tokens = usage(line)
            else:
                completion.arrivals.append(time.perf_counter())
    finally:
        writer.close()
    if completion.tokens is None:
        raise RequestFailed(f"a stream ended after {len(completion.arrivals)} events")


def usage(line: bytes) -> int:
    """The tokens that the last event of a stream counts."""
    return json.loads(line[len(EVENT) :])["usage"]["completion_tokens"]


async def all_at_once(
    host: str, port: int, contents: list[bytes], seconds: float
) -> tuple[list[Completion], bool]:
    """Send all requests now; what arrived, and whether time ran out before all were done.

    What is not done then is aborted. RequestFailed if any request failed."""
    completions = [Completion(time.perf_counter()) for _ in contents]
    tasks = [
        asyncio.create_task(complete(host, port, content, completion))
        for content, completion in zip(contents, completions, strict=True)
    ]
    try:
        _, pending = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise RequestFailed(str(result)) from result
    return completions, bool(pending)
