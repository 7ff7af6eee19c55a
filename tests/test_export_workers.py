"""Weights done by several processes: the same bytes as in one, and errors that name what went wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gemma_edge.export import store
from gemma_edge.export.checkpoint import CheckpointError, open_checkpoint
from gemma_edge.export.pieces import Piece
from gemma_edge.export.plan import PlannedWeight
from gemma_edge.export.recipes import Storage
from gemma_edge.export.store import DataFile, store_weights
from gemma_edge.export.workers import WorkerError, Workers

ROWS, WIDTH = 96, 64
WEIGHTS = [
    PlannedWeight("a", (ROWS, WIDTH), Storage(4, 32, "search"), "data", False),
    PlannedWeight("b", (ROWS, WIDTH), Storage(8, 64, "nearest"), "data", False),
    PlannedWeight("c", (ROWS, WIDTH), Storage(32, 0, "float"), "data", False),
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {weight.name: torch.randn(ROWS, WIDTH).to(torch.bfloat16) for weight in WEIGHTS}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def piece_of(checkpoint: Path, out: Path) -> Piece:
    source = open_checkpoint(checkpoint).entry("a")
    return Piece(source, 0, ROWS, WIDTH, Storage(8, 32, "nearest"), out, 0, ROWS * WIDTH)


def test_any_number_of_processes_writes_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "PIECE_VALUES", 10 * WIDTH)  # pieces of ten rows, the last one shorter
    results = []
    for workers in (0, 2):
        values = dict.fromkeys("abc", 0)

        def progress(name: str, count: int, values: dict[str, int] = values) -> None:
            values[name] += count

        with DataFile(checkpoint / f"data{workers}") as file:
            stored = store_weights(
                {"data": file},
                open_checkpoint(checkpoint),
                WEIGHTS,
                progress,
                workers=workers,
            )
        reports = [weight.report for weight in stored.values()]
        results.append((reports, values, (checkpoint / f"data{workers}").read_bytes()))
    assert results[0] == results[1]
    reports, values, data = results[0]
    assert values == dict.fromkeys("abc", ROWS * WIDTH)
    assert 0.05 < reports[0].relative_error < 0.1 and reports[2] is None
    floats = np.frombuffer(data, np.float32, ROWS * WIDTH, stored["c"].data_offset)
    np.testing.assert_array_equal(floats.reshape(ROWS, WIDTH), open_checkpoint(checkpoint).read("c"))


def test_errors_come_back_as_they_are(checkpoint: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.touch()
    piece = piece_of(checkpoint, out)
    cut = replace(piece, source=replace(piece.source, offset=1 << 20))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends inside a"), Workers(2) as workers:
        list(workers.map([("a", piece), ("a", cut)]))
    with pytest.raises(OSError, match="No space left"), Workers(1) as workers:
        list(workers.map([("a", replace(piece, file=Path("/dev/full")))]))
    with pytest.raises(FileNotFoundError), Workers(1) as workers:  # whoever removed it wants it gone
        list(workers.map([("a", replace(piece, file=tmp_path / "gone" / "out"))]))
    assert not (tmp_path / "gone").exists()


def test_a_killed_worker_is_named_and_an_error_ends_all(checkpoint: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.touch()
    with pytest.raises(WorkerError, match=r"ended with status -9 at a"), Workers(2) as workers:
        processes = list(workers._processes)
        processes[0].send_signal(signal.SIGKILL)
        list(workers.map([("a", piece_of(checkpoint, out))] * 8))
    assert all(process.poll() is not None for process in processes)


def test_workers_end_with_the_process_that_started_them():
    """Their input ends when it is killed, so nothing is left running."""
    program = (
        "import time; from gemma_edge.export.workers import Workers\n"
        "print(*[process.pid for process in Workers(2)._processes], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() and not _is_zombie(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_zombie(pid: int) -> bool:
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
