"""Real MQTT brokers on free ports for tests: mosquitto as a process, amqtt in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from amqtt.broker import Broker


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, timeout_s: float = 10.0) -> None:
    """Return once something listens on the local port."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing listens on port {port} after {timeout_s} s")
        time.sleep(0.02)


def tool(name: str) -> str:
    """The path of a mosquitto program; a missing one is an error, since the tests mean nothing without it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")
    assert found, f"{name} is not installed: apt-get install mosquitto mosquitto-clients (.ci/run does it)"
    return found


class Mosquitto:
    """A mosquitto process that can be killed and started again on its port."""

    def __init__(self, folder: Path, settings: str = "allow_anonymous true\n") -> None:
        """settings: lines of mosquitto.conf after the listener's."""
        self.port = free_port()
        self._config = folder / "mosquitto.conf"
        self._config.write_text(f"listener {self.port} 127.0.0.1\n{settings}")
        self._log = folder / "mosquitto.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [tool("mosquitto"), "-v", "-c", str(self._config)], stdout=log, stderr=subprocess.STDOUT
            )
        try:
            wait_for_port(self.port)
        except TimeoutError as cause:
            self.kill()
            raise TimeoutError(f"mosquitto did not start:\n{self.log()}") from cause

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def log(self) -> str:
        return self._log.read_text(errors="replace")


@contextlib.contextmanager
def mosquitto(folder: Path, settings: str = "allow_anonymous true\n") -> Iterator[Mosquitto]:
    broker = Mosquitto(folder, settings)
    try:
        yield broker
    finally:
        broker.kill()


@contextlib.contextmanager
def amqtt_broker() -> Iterator[int]:
    """An amqtt broker (MQTT 3.1.1 only) in a thread; the port."""
    port = free_port()
    loop = asyncio.new_event_loop()
    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }
    asyncio.set_event_loop(loop)  # amqtt makes futures before it runs
    broker = Broker(config, loop)
    asyncio.set_event_loop(None)

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(broker.start())
        loop.run_forever()

    thread = threading.Thread(target=run, name="amqtt", daemon=True)
    thread.start()
    wait_for_port(port)
    try:
        yield port
    finally:
        asyncio.run_coroutine_threadsafe(broker.shutdown(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
