"""`make demo`: the whole way with the bundled model, and what it says when something is wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gemma_edge.examples.sensor_summary import demo
from gemma_edge.examples.sensor_summary.plain import plain_summary
from gemma_edge.runtime.transports.mqtt_address import Topics, parse_broker_url

from .support.answering_daemon import answering_daemon
from .support.brokers import mosquitto

DEMO = [sys.executable, "-m", "gemma_edge.examples.sensor_summary.demo"]


def test_the_demo_with_the_bundled_model(nano_bundle: Any) -> None:
    """Broker, daemon, application and replay: every window is summarised by the model, and truly."""
    path = str(getattr(nano_bundle, "path", nano_bundle))
    done = subprocess.run([*DEMO, path], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[2-4] of 4 summaries by the model", done.stdout), done.stdout
    assert "4 of 4 true: passed" in done.stdout
    for told in ("00:00–06:00", "06:00–12:00", "12:00–18:00", "18:00–00:00", "tank/level", "urgent"):
        assert told in done.stdout
    assert "Traceback" not in done.stderr


def test_an_interrupted_demo_leaves_nothing_behind(nano_bundle: Any) -> None:
    path = str(getattr(nano_bundle, "path", nano_bundle))
    with subprocess.Popen([*DEMO, path, "--speed", "60"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("daemon online"):
                break
        children = _children(process.pid)
        assert any("serve" in command for command in children.values())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    for pid in children:
        assert not Path(f"/proc/{pid}").exists(), children[pid]


def _children(parent: int) -> dict[int, str]:
    """Process id -> command line of all children."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
                if int(stat[1]) == parent:
                    found[int(entry)] = Path(f"/proc/{entry}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
    return found


def test_a_folder_that_is_no_bundle_is_told_at_once(tmp_path: Path) -> None:
    done = subprocess.run([*DEMO, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "not a bundle" in done.stderr


@contextmanager
def prepared(monkeypatch: pytest.MonkeyPatch, folder: Path, change: dict[str, Any]) -> Iterator[None]:
    """The demo's daemon gives plain summaries with a `change` instead of a model's."""
    config = demo.load_config(demo.HERE / "greenhouse.yaml")
    windows = demo.windows_of(config, demo.HERE / "greenhouse-day.jsonl.gz").values()
    answers = [
        msgspec.json.encode(msgspec.to_builtins(plain_summary(window)) | change).decode()
        for window in windows
    ]

    @contextmanager
    def own_daemon(bundle: Path, url: str) -> Iterator[Any]:
        class Running:
            def check(self) -> None:
                pass

            def wait_for(self, online: threading.Event, stop: threading.Event) -> None:
                assert online.wait(20)

        with answering_daemon(folder, parse_broker_url(url).port, Topics("gemma-edge", demo.NODE), answers):
            yield Running()

    monkeypatch.setattr(demo, "own_daemon", own_daemon)
    # The test tokenizer spends about a token on a byte.
    roomy = msgspec.structs.replace(config, daemon=msgspec.structs.replace(config.daemon, max_tokens=4000))
    monkeypatch.setattr(demo, "load_config", lambda path: roomy)
    yield


def run(*options: str) -> int:
    paths = (demo.HERE / "greenhouse.yaml", demo.HERE / "greenhouse-day.jsonl.gz")
    return demo.run_demo(Path("unused"), options[0] if options else None, *paths, 0.0, threading.Event())


def test_true_answers_pass_through_the_embedded_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with prepared(monkeypatch, tmp_path, {}):
        assert run() == 0
    out = capsys.readouterr().out
    assert "4 of 4 summaries by the model, 0 not; 4 of 4 true: passed" in out
    assert "12:00–18:00 · greenhouse-north: 4 anomalies · urgent" in out
    assert "! tank/level below: worst 8.9 %, limit 25.0 %, since 16:16" in out


def test_a_model_that_lies_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        mosquitto(tmp_path) as broker,
        prepared(monkeypatch, tmp_path, {"summary": "It was 99.9 °C in the attic/room."}),
    ):
        assert run(f"mqtt://127.0.0.1:{broker.port}") == 1
    out = capsys.readouterr().out
    assert "0 of 4 summaries by the model, 4 not; 4 of 4 true: FAILED" in out
    assert "99.9" not in out, "nothing untrue is published"


def test_an_untrue_published_summary_fails_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo judges by itself: here the application's own check is switched off."""
    from gemma_edge.examples.sensor_summary import summarizer

    monkeypatch.setattr(summarizer, "untrue", lambda window, summary: [])
    with prepared(monkeypatch, tmp_path, {"summary": "It was 99.9 °C."}):
        assert run() == 1
    out = capsys.readouterr().out
    assert "UNTRUE: 99.9 °C is not in the data" in out
    assert "0 of 4 true: FAILED" in out
