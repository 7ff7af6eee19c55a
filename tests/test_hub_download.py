"""Downloads from a Hub: a broken connection goes on where it broke, a stopped one with what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .support.small_hub import COMMIT, SmallHub

SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {"a": "%s", "b": "%s"}}'
    % tuple(s.encode() for s in SHARDS),
    SHARDS[0]: bytes(range(256)) * 50_000,  # more than the client writes at once, 10 MiB
    SHARDS[1]: bytes(reversed(range(256))) * 4000,
    "README.md": b"not part of an export",
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[SmallHub]:
    folder = tmp_path / "repository"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    with SmallHub(folder) as hub:
        yield hub


def find(hub: SmallHub, cache: Path, *, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """`find_checkpoint` in a process of its own: the Hub's client reads its settings when it is imported."""
    program = (
        "from gemma_edge.export.source import *\n"
        f"try: print(find_checkpoint('org/tiny', offline={offline}).folder)\n"
        "except SourceError as error: raise SystemExit(str(error))"
    )
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_broken_connection_is_taken_up_where_it_broke(hub: SmallHub, tmp_path: Path):
    hub.break_after[SHARDS[0]] = 12_000_000
    done = find(hub, tmp_path / "cache")
    folder = Path(done.stdout.strip())
    assert done.returncode == 0 and folder.name == COMMIT, done.stderr
    assert {path.name for path in folder.iterdir()} == FILES.keys() - {"README.md"}
    assert all((folder / name).read_bytes() == FILES[name] for name in SHARDS)
    first, second = [first for name, first in hub.sent if name == SHARDS[0]]
    assert first == 0 and 10_000_000 < second <= 12_000_000


def test_a_stopped_download_goes_on_with_what_is_missing(hub: SmallHub, tmp_path: Path):
    hub.gone.add(SHARDS[1])
    failed = find(hub, tmp_path / "cache")
    assert failed.returncode == 1
    assert "cannot be downloaded" in failed.stderr and "goes on from there" in failed.stderr
    offline = find(hub, tmp_path / "cache", offline=True)
    assert "is not whole in the Hub cache" in offline.stderr and "goes on where it stopped" in offline.stderr
    hub.gone.clear()
    hub.sent.clear()
    done = find(hub, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    sent = [name for name, _ in hub.sent]  # small files may have been on their way when it stopped
    assert SHARDS[1] in sent and SHARDS[0] not in sent
    hub.sent.clear()
    assert find(hub, tmp_path / "cache", offline=True).stdout == done.stdout and hub.sent == []
