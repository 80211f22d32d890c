# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""The server helper: what a reading of /metrics says, and that nothing is left running."""

from __future__ import annotations

import os
import socket
import sys
import textwrap
import time
from pathlib import Path

import pytest

from gkv_vllm import serving
from gkv_vllm.serving import Metrics, ServerFailed, serve

pytest.importorskip("prometheus_client")

READING = """\
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:num_preemptions_total{engine="1",model_name="m"} 4.0
"""

# Stands in for `vllm serve`: answers /health, and a child of its own ignores SIGTERM.
FAKE_SERVER = """\
    #!{python}
    import http.server, os, signal, subprocess, sys, time
    port = int(sys.argv[sys.argv.index("--port") + 1])
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    print("child", subprocess.Popen([sys.executable, "-c", code]).pid, flush=True)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.encode())
        def log_message(self, *args):
            pass
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
FAILING_SERVER = """\
    #!{python}
    import sys
    print("no such model")
    sys.exit(3)
"""


def _command(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "vllm"
    path.write_text(textwrap.dedent(script).format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setattr(serving, "vllm_command", lambda: str(path))


def _runs(pid: int) -> bool:
    """Whether the process still runs; a zombie that init has not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_metric_is_the_sum_over_its_samples():
    metrics = Metrics(READING)
    assert metrics.value("vllm:num_preemptions_total") == 7
    assert metrics.value("vllm:num_preemptions_total", engine="1") == 4


def test_a_misspelt_metric_is_an_error_not_zero():
    with pytest.raises(KeyError, match="vllm:preemptions"):
        Metrics(READING).value("vllm:preemptions")
    assert Metrics(READING).get("vllm:preemptions") == 0


def test_a_free_port_can_be_bound():
    with socket.socket() as sock:
        sock.bind((serving.HOST, serving.free_port()))


def test_a_server_that_ends_is_reported_with_its_log(tmp_path, monkeypatch):
    _command(tmp_path, monkeypatch, FAILING_SERVER)
    with (
        pytest.raises(ServerFailed, match=r"status 3:\nno such model"),
        serve("model", log=tmp_path / "log"),
    ):
        pass


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_no_process_of_the_server_survives_the_block(tmp_path, monkeypatch):
    _command(tmp_path, monkeypatch, FAKE_SERVER)
    with pytest.raises(ZeroDivisionError), serve("model", log=tmp_path / "log") as server:
        assert server.get("/hello") == "/hello"
        child = int(server.log_tail().split()[1])
        assert _runs(child)
        raise ZeroDivisionError
    assert server.process.poll() is not None
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)
