"""The demo: broker, daemon and application for real, over one recorded day; prints what is published, and
judges it.

    python -m gemma_edge.examples.sensor_summary.demo BUNDLE [--broker URL] [--config F] [--log F] [--speed N]

Exit status 0 only if every window of the log was summarised, every summary is true by an independent check
against the log file, and the model wrote at least half of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import logging
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ...runtime.errors import GemmaEdgeError
from .app import App, Timer, iso, make_window
from .collector import Collector
from .config import ClockTopic, Config, load_config
from .facts import untrue
from .mqtt import Connection, Message, Stopped
from .prompt import Anomaly, Summary
from .replay import read_log, replay
from .window import Window

HERE = Path(__file__).parent
NODE = "demo"
START_TIMEOUT_S = 120.0  # for the daemon to load the model
STOP_TIMEOUT_S = 15.0
SILENCE_TIMEOUT_S = 300.0  # without a new summary
SEVERITIES = ("normal", "attention", "urgent")


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("amqtt").setLevel(logging.CRITICAL)
    logging.getLogger("transitions").setLevel(logging.CRITICAL)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        return run_demo(args.bundle, args.broker, args.config, args.log, args.speed, stop)
    except GemmaEdgeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except Stopped:
        print("demo: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="A recorded day of a greenhouse, summarised by a real daemon."
    )
    parser.add_argument(
        "bundle", metavar="BUNDLE", type=Path, help="bundle folder, made by gemma-edge export"
    )
    parser.add_argument(
        "--broker", metavar="URL", help="mqtt://host[:port] (default: one of its own on loopback)"
    )
    parser.add_argument("--config", metavar="FILE", type=Path, default=HERE / "greenhouse.yaml")
    parser.add_argument("--log", metavar="FILE", type=Path, default=HERE / "greenhouse-day.jsonl.gz")
    parser.add_argument(
        "--speed", type=float, default=0.0, help="recorded seconds per second (default: as fast as it goes)"
    )
    return parser


def run_demo(
    bundle: Path, broker: str | None, config_path: Path, log_path: Path, speed: float, stop: threading.Event
) -> int:
    """Everything, from the first check of the files to the verdict; the exit status."""
    config = load_config(config_path)
    with contextlib.ExitStack() as stack:
        url = broker or stack.enter_context(own_broker(stop))
        config = for_demo(config, url)
        expected = windows_of(config, log_path)
        if not expected:
            raise GemmaEdgeError(f"{log_path}: no window of {config_path} ends in it")
        print(f"{log_path.name}: {len(expected)} windows, broker {url}", flush=True)

        arrived: queue.Queue[dict[str, Any]] = queue.Queue()
        online = threading.Event()
        topics = config.daemon.topics
        summaries = f"{topics.base}/{topics.node}/summary/"

        def watch(message: Message) -> None:
            if message.topic == topics.availability:
                (online.set if message.payload == b"online" else online.clear)()
            elif message.payload and not message.retained:  # retained here: from an earlier run
                arrived.put(msgspec.json.decode(message.payload))

        subscriber = Connection(
            config.broker_address, [topics.availability, f"{summaries}+"], watch, stop=stop, role="demo-watch"
        )
        stack.enter_context(subscriber)
        began_s = time.monotonic()
        daemon = stack.enter_context(own_daemon(bundle, url))
        daemon.wait_for(online, stop)
        print(f"daemon online after {time.monotonic() - began_s:.1f} s", flush=True)

        began_s = time.monotonic()
        stack.enter_context(running_app(App(config, app_stop := threading.Event()), app_stop, stop))
        assert isinstance(config.clock, ClockTopic)
        replayer = Connection(config.broker_address, [], lambda _: None, stop=stop, role="demo-replay")
        with replayer:
            count = replay(read_log(log_path), replayer, config.clock.topic, speed=speed, stop=stop)
        if stop.is_set():
            raise Stopped
        print(f"{count} messages replayed in {time.monotonic() - began_s:.1f} s", flush=True)
        judged = judge(expected, arrived, daemon, stop)
        print(f"\n{len(expected)} windows summarised in {time.monotonic() - began_s:.1f} s", flush=True)
    return verdict(judged)


# --- what must come out, straight from the log file ---


def for_demo(config: Config, url: str) -> Config:
    """The same application on the demo's broker and daemon, with the log's clock."""
    daemon = msgspec.structs.replace(config.daemon, node=NODE)
    clock = ClockTopic(topic=f"{daemon.base}/{NODE}/clock")
    return msgspec.structs.replace(config, broker=url, daemon=daemon, clock=clock)


def windows_of(config: Config, log_path: Path) -> dict[tuple[str, str], Window]:
    """(summary's name, ISO end) -> window, computed without MQTT."""
    collector, timer = Collector(config, quiet=True), Timer(config)
    found: dict[tuple[str, str], Window] = {}
    for record in read_log(log_path):
        now_s = record.time.timestamp()
        for index, start_s, end_s in timer.due(now_s):
            summary = config.summaries[index]
            window = make_window(collector.snapshot(index, end_s, start_s), summary.site, config.zone)
            if window.sensors:
                found[summary.name, iso(end_s, config.zone)] = window
        collector.add(record.topic, record.payload.encode(), now_s=now_s)
    return found


def judge(
    expected: dict[tuple[str, str], Window],
    arrived: queue.Queue[dict[str, Any]],
    daemon: DaemonProcess,
    stop: threading.Event,
) -> list[tuple[str, list[str]]]:
    """(who wrote it, what is untrue) of each expected summary, printed as it arrives."""
    judged: list[tuple[str, list[str]]] = []
    missing, deadline = dict(expected), time.monotonic() + SILENCE_TIMEOUT_S
    while missing:
        if stop.is_set():
            raise Stopped
        daemon.check()
        try:
            report = arrived.get(timeout=0.2)
        except queue.Empty:
            if time.monotonic() > deadline:
                return [
                    *judged,
                    *(("nobody", [f"no summary of {name} until {end}"]) for name, end in missing),
                ]
            continue
        deadline = time.monotonic() + SILENCE_TIMEOUT_S
        window = missing.pop((report["name"], report["end"]), None)
        problems = ["it belongs to no window of the log"] if window is None else check_report(report, window)
        judged.append((report["generated_by"], problems))
        print(f"\n{describe(report, problems)}", flush=True)
    return judged


def check_report(report: dict[str, Any], window: Window) -> list[str]:
    """What in a published report the log does not bear out."""
    summary = Summary(
        report["title"],
        report["summary"],
        report["severity"],
        tuple(Anomaly(a["sensor"], a["kind"], a["detail"]) for a in report["anomalies"]),
        tuple(report["actions"]),
    )
    ends = list(itertools.accumulate(report["parts"]))
    parts = [replace(window, sensors=window.sensors[a:b]) for a, b in itertools.pairwise([0, *ends])]
    problems = untrue(window, summary, parts=parts)
    if (report["start"], report["sensors"]) != (iso(window.start_s, window.zone), len(window.sensors)):
        problems.append(f"it is about {report['sensors']} sensors from {report['start']}: readings were lost")
    return problems


def describe(report: dict[str, Any], problems: list[str]) -> str:
    """A published summary as a person wants to read it."""
    start, end = report["start"], report["end"]
    lines = [
        f"── {start[:10]} {start[11:16]}–{end[11:16]} · {report['title']} · {SEVERITIES[report['severity']]}"
    ]
    lines += textwrap.wrap(report["summary"], 100, initial_indent="   ", subsequent_indent="   ")
    lines += [f"   ! {a['sensor']} {a['kind']}: {a['detail']}" for a in report["anomalies"]]
    lines += [f"   → {action}" for action in report["actions"]]
    attempts = f", attempt {report['attempts']}" if report["attempts"] > 1 else ""
    author = f"by {report['model']}" if report["generated_by"] != "computed" else "computed, not by the model"
    lines.append(f"   {author}{attempts}; {'true' if not problems else 'UNTRUE: ' + '; '.join(problems)}")
    return "\n".join(lines)


def verdict(judged: list[tuple[str, list[str]]]) -> int:
    """Print the outcome; the exit status."""
    by_model = sum(author == "model" for author, _ in judged)
    untrue_ones = sum(bool(problems) for _, problems in judged)
    good = not untrue_ones and by_model * 2 >= len(judged)
    print(
        f"{by_model} of {len(judged)} summaries by the model, {len(judged) - by_model} not; "
        f"{len(judged) - untrue_ones} of {len(judged)} true: {'passed' if good else 'FAILED'}"
    )
    return 0 if good else 1


# --- processes and threads ---


class DaemonProcess:
    """`gemma-edge serve` as a process of its own, its log in a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def check(self) -> None:
        """Raises GemmaEdgeError with the end of its log when the daemon has ended."""
        if self._process.poll() is not None:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise GemmaEdgeError(f"the daemon ended with status {self._process.returncode}:\n{tail}")

    def wait_for(self, online: threading.Event, stop: threading.Event) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not online.wait(0.1):
            self.check()
            if stop.is_set():
                raise Stopped
            if time.monotonic() > deadline:
                raise GemmaEdgeError(f"the daemon is not online after {START_TIMEOUT_S:.0f} s")


@contextlib.contextmanager
def own_daemon(bundle: Path, url: str) -> Iterator[DaemonProcess]:
    """Start the daemon on `bundle`, and stop it."""
    with tempfile.TemporaryDirectory(prefix="gemma-edge-demo-") as folder:
        log = Path(folder) / "daemon.log"
        command = [sys.executable, "-m", "gemma_edge.cli", "serve", str(bundle)]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, "--mqtt", url, "--node", NODE, "--no-http"],
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            yield DaemonProcess(process, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def running_app(app: App, app_stop: threading.Event, stop: threading.Event) -> Iterator[None]:
    """The application in a thread of its own."""
    thread = threading.Thread(target=app.run, name="application")
    thread.start()
    try:
        while not app.ready.wait(0.1):
            if stop.is_set():
                raise Stopped
            if not thread.is_alive():
                raise GemmaEdgeError("the application could not start")
        yield
    finally:
        app_stop.set()
        thread.join()


@contextlib.contextmanager
def own_broker(stop: threading.Event) -> Iterator[str]:
    """An MQTT broker (amqtt) in a thread, on a free loopback port; its URL."""
    try:
        from amqtt.broker import Broker
    except ImportError as error:
        raise GemmaEdgeError(
            "no --broker given, and amqtt is not installed: pip install 'gemma-edge[broker]'"
        ) from error
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }
    loop = asyncio.new_event_loop()
    outcome: queue.Queue[BaseException | None] = queue.Queue()
    ending = asyncio.Event()

    async def serve() -> None:
        try:
            broker = Broker(settings, loop=loop)
            await broker.start()
        except BaseException as error:
            outcome.put(error)
            raise
        outcome.put(None)
        await ending.wait()
        await broker.shutdown()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="broker", daemon=True)
    thread.start()
    if (problem := outcome.get()) is not None:
        raise GemmaEdgeError(f"the embedded broker does not start: {problem}") from problem
    try:
        yield f"mqtt://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join(STOP_TIMEOUT_S)
        if not thread.is_alive():
            loop.close()


if __name__ == "__main__":
    sys.exit(main())
