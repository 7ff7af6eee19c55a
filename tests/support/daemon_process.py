"""Runs a daemon as a real process and talks to its socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPTED = [sys.executable, "-m", "tests.support.scripted_daemon"]
SERVE = [sys.executable, "-m", "gemma_edge.cli", "serve"]


class DaemonProcess:
    """A started daemon; its log is a file."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                list(command), cwd=ROOT, stderr=output, stdout=output, env=os.environ | (env or {})
            )

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_ready(self, timeout_s: float = 60.0) -> str:
        """The ready line."""
        wait_until(lambda: "ready: " in self.log() or self.process.poll() is not None, timeout_s, self.log)
        assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log()}"
        return next(line for line in self.log().splitlines() if line.startswith("ready: "))

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait_exit(self, timeout_s: float = 30.0) -> int:
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def daemon_process(
    command: Sequence[str], log: Path, env: dict[str, str] | None = None, *, ready: bool = True
) -> Iterator[DaemonProcess]:
    """A running daemon, killed at the end if it still runs."""
    daemon = DaemonProcess(command, log, env)
    try:
        if ready:
            daemon.wait_ready()
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout_s: float = 60.0) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def request(
    path: Path,
    method: str,
    target: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    *,
    timeout_s: float = 60.0,
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and decoded body of one HTTP request on the socket at `path`."""
    connection = UnixConnection(path, timeout_s)
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, target, raw, headers or {})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, json.loads(data)


def chat(path: Path, content: str, **more: Any) -> tuple[int, dict[str, str], Any]:
    return request(path, "POST", "/v1/chat/completions", {"messages": user(content), **more})


def stream(path: Path, body: dict[str, Any], *, timeout_s: float = 60.0) -> list[str]:
    """The `data:` of each server-sent event."""
    connection = UnixConnection(path, timeout_s)
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": True}))
    response = connection.getresponse()
    assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
    text = response.read().decode()
    connection.close()
    return [block.removeprefix("data: ") for block in text.split("\n\n") if block]


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def wait_until(
    holds: Callable[[], object], timeout_s: float = 60.0, context: Callable[[], str] = str
) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain {context()}"
        time.sleep(0.01)
