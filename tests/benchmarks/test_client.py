# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The streaming client, against a server that sends what vLLM sends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from gpu import client

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
GAP = 0.05
Answer = Callable[[asyncio.StreamWriter, dict[str, object]], Awaitable[None]]


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def token(text: str = "x") -> bytes:
    return b'data: {"choices":[{"text":%b}],"usage":null}\n\n' % json.dumps(text).encode()


def usage(tokens: int) -> bytes:
    counts = json.dumps({"completion_tokens": tokens}, separators=(",", ":"))
    return b'data: {"choices":[],"usage":%b}\n\n' % counts.encode()


def against(answer: Answer, count: int, seconds: float) -> tuple[list[client.Completion], bool]:
    """Send requests to a server that answers so."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
        (length,) = (x for x in head.split(b"\r\n") if x.lower().startswith(b"content-length"))
        asked = json.loads(await reader.readexactly(int(length.split(b":")[1])))
        await answer(writer, asked)
        writer.close()

    async def run() -> tuple[list[client.Completion], bool]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            contents = [client.body("m", [1, 2, i], 4) for i in range(count)]
            return await client.all_at_once("127.0.0.1", port, contents, seconds)

    return asyncio.run(run())


async def four_tokens(writer: asyncio.StreamWriter, asked: dict[str, object]) -> None:
    assert asked["max_tokens"] == 4 and asked["ignore_eos"] and asked["stream"]
    writer.write(HEAD)
    for _ in range(4):
        await asyncio.sleep(GAP)
        writer.write(chunk(token()))
        await writer.drain()
    writer.write(chunk(usage(4)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def test_every_token_has_its_time_and_the_count_has_none() -> None:
    completions, cut = against(four_tokens, 3, 10.0)
    assert not cut and [c.tokens for c in completions] == [4, 4, 4]
    for completion in completions:
        assert len(completion.arrivals) == 4
        assert completion.arrivals[0] - completion.sent >= GAP
        assert all(gap > GAP / 2 for gap in completion.gaps) and len(completion.gaps) == 3


def test_a_token_that_reads_like_the_end_is_a_token() -> None:
    async def answer(writer: asyncio.StreamWriter, asked: dict[str, object]) -> None:
        writer.write(HEAD + chunk(token('"choices":[]')) + chunk(token("data: [DONE]")))
        writer.write(chunk(usage(2)) + chunk(b"data: [DONE]\n\n"))

    ((completion,), _) = against(answer, 1, 10.0)
    assert (len(completion.arrivals), completion.tokens) == (2, 2)


def test_what_takes_too_long_is_aborted_and_counted_so_far() -> None:
    hung_up = []

    async def answer(writer: asyncio.StreamWriter, asked: dict[str, object]) -> None:
        writer.write(HEAD + chunk(token()))
        await writer.drain()
        try:
            while True:
                await asyncio.sleep(0.02)
                writer.write(b"1\r\n\n\r\n")
                await writer.drain()
        except ConnectionError:
            hung_up.append(True)

    completions, cut = against(answer, 2, 0.3)
    assert cut and [c.tokens for c in completions] == [None, None]
    assert [len(c.arrivals) for c in completions] == [1, 1]


def test_a_refusal_is_an_error_that_says_why() -> None:
    async def answer(writer: asyncio.StreamWriter, asked: dict[str, object]) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n{'error': 'kv_budget is too small'}")

    with pytest.raises(client.RequestFailed, match="(?s)400 Bad Request: .*kv_budget is too small"):
        against(answer, 2, 10.0)


def test_a_stream_that_breaks_off_is_an_error() -> None:
    async def answer(writer: asyncio.StreamWriter, asked: dict[str, object]) -> None:
        writer.write(HEAD + chunk(token()))

    with pytest.raises(client.RequestFailed, match="ended after 1 events"):
        against(answer, 1, 10.0)


def test_a_page_is_read_whole_and_an_error_is_one() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        good = head.startswith(b"GET /metrics ")
        writer.write(b"HTTP/1.1 200 OK\r\n" if good else b"HTTP/1.1 404 Not Found\r\n")
        writer.write(b"content-length: 5\r\n\r\na")
        await writer.drain()
        await asyncio.sleep(GAP)
        writer.write(b"b 1\n")
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            assert await client.get("127.0.0.1", port, "/metrics") == "ab 1\n"
            with pytest.raises(client.RequestFailed, match="404"):
                await client.get("127.0.0.1", port, "/nothing")

    asyncio.run(run())
