"""What the daemon adds to the engine's own time: one greedy request over HTTP whole, streamed, and over MQTT.

python bench/serve.py BUNDLE [--new-tokens 64] [--repeats 10]

Each request goes to a `gemma-edge serve` process. What it adds is the time until the answer is complete, less
the prefill and decode times that the answer reports. MQTT is measured with a local mosquitto, if there is
one, that waits for nothing (set_tcp_nodelay, without which it adds 40 ms).
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from common import machine, median, print_json, print_machine


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=600)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def over_http(path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """The completion; or a stream's last chunk, with the timings, and `first_s` until the first token."""
    start = time.perf_counter()
    connection = UnixConnection(path)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    if not body.get("stream"):
        return json.loads(response.read())
    first_s = None
    last: dict[str, Any] = {}
    while line := response.readline():
        if line.startswith(b"data: {"):
            first_s = first_s or time.perf_counter() - start
            last = json.loads(line[6:])
    return last | {"first_s": first_s}


@contextlib.contextmanager
def local_broker(folder: Path) -> Iterator[int | None]:
    """The port of a mosquitto, or None if it is not installed."""
    program = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/opt/homebrew/sbin")
    if program is None:
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n"
    (folder / "mosquitto.conf").write_text(settings)
    process = subprocess.Popen([program, "-c", str(folder / "mosquitto.conf")], stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


def measure(ask: Callable[[], dict[str, Any]], repeats: int) -> dict[str, float]:
    """Medians, in milliseconds, after one request that warms up."""
    ask()
    totals, added, firsts = [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        answer = ask()
        took_s = time.perf_counter() - start
        timings = answer["timings"]
        totals.append(took_s * 1e3)
        added.append((took_s - timings["prefill_s"] - timings["decode_s"]) * 1e3)
        if answer.get("first_s"):
            firsts.append((answer["first_s"] - timings["ttft_s"]) * 1e3)
    result = {
        "total_ms": median(totals),
        "added_ms": median(added),
        "tokens": answer["usage"]["completion_tokens"],
    }
    return result | ({"added_to_first_token_ms": median(firsts)} if firsts else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    about = machine()
    print_machine(about)
    body = {"messages": [{"role": "user", "content": "Write a long text."}], "max_tokens": args.new_tokens}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, local_broker(Path(name)) as port:
        path = Path(name) / "bench.sock"
        command = [sys.executable, "-m", "gemma_edge.cli", "serve", str(args.bundle), "--socket", str(path)]
        command += ["--mqtt", f"mqtt://127.0.0.1:{port}", "--node", "bench"] if port else []
        started = time.perf_counter()
        daemon = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert daemon.stderr is not None
        try:
            for line in daemon.stderr:
                if line.startswith("ready: "):
                    break
            else:
                sys.exit(f"the daemon did not start (exit status {daemon.wait()})")
            results["start_s"] = round(time.perf_counter() - started, 2)
            results["http"] = measure(lambda: over_http(path, body), args.repeats)
            streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
            results["http_stream"] = measure(lambda: over_http(path, streamed), args.repeats)
            if port:
                results["mqtt"] = measure(mqtt_asker(port, body), args.repeats)
        finally:
            daemon.terminate()
            daemon.wait()
    for way in ("http", "http_stream", "mqtt"):
        if way in results:
            print(f"{way:12} " + ", ".join(f"{name} {value:.2f}" for name, value in results[way].items()))
    print_json({"bench": "serve", "machine": about, "bundle": str(args.bundle), **results})


def mqtt_asker(port: int, body: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """A function that sends the request and waits for the reply."""
    replies: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    subscribed: queue.SimpleQueue[bool] = queue.SimpleQueue()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    client.on_message = lambda client, userdata, message: replies.put(json.loads(message.payload))
    client.on_subscribe = lambda *_: subscribed.put(True)
    client.on_socket_open = lambda client, userdata, sock: sock.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
    )
    client.connect("127.0.0.1", port)
    client.loop_start()
    client.subscribe("gemma-edge/bench/response/chat", qos=1)
    subscribed.get(timeout=10)

    def ask() -> dict[str, Any]:
        client.publish("gemma-edge/bench/request/chat", json.dumps(body), qos=1)
        return replies.get(timeout=600)

    return ask


if __name__ == "__main__":
    main()
