"""Denormal numbers: zero on the thread that runs a graph for as long as it does, numbers everywhere else."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.runtime.audio.encoder import AudioEncoder
from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.denormals import AVAILABLE, denormals_as_zero
from gemma_edge.runtime.engine import Engine


def are_zero() -> bool:
    """Of this thread."""
    return not (np.full(8, 1e-39, np.float32) * np.float32(0.5)).any()


class Watched:
    """A session that notes whether denormals are zero on the thread that runs it."""

    def __init__(self, session: Any, seen: list[bool]) -> None:
        self._session, self._seen = session, seen

    def __getattr__(self, name: str) -> Any:
        if name in ("run", "run_with_iobinding"):
            self._seen.append(are_zero())
        return getattr(self._session, name)


def test_only_in_the_block_and_on_its_thread():
    elsewhere: list[bool] = []
    assert not are_zero()
    with denormals_as_zero():
        assert are_zero() == AVAILABLE
        other = threading.Thread(target=lambda: elsewhere.append(are_zero()))
        with denormals_as_zero():
            pass
        assert are_zero() == AVAILABLE
    other.start()
    other.join()
    assert not are_zero() and elsewhere == [False]


def test_an_error_ends_it_too():
    with pytest.raises(ValueError), denormals_as_zero():
        raise ValueError
    assert not are_zero()


def test_prompts_and_steps_on_a_thread_that_did_not_open_the_engine(tiny_bundle):
    opened: list[Engine] = []
    opener = threading.Thread(target=lambda: opened.append(Engine(tiny_bundle().bundle)))
    opener.start()
    opener.join()
    engine, seen = opened[0], list[bool]()
    session = engine._session
    session.decoder = Watched(session.decoder, seen)
    session.embeddings = Watched(session.embeddings, seen)
    assert len(list(engine.generate(range(30, 50), max_new_tokens=3))) == 3
    assert len(seen) >= 6 and set(seen) == {AVAILABLE}
    assert not are_zero()


def test_sounds(nano_bundle: Path):
    encoder, seen = AudioEncoder(open_bundle(nano_bundle), threads=1), list[bool]()
    encoder.graph = Watched(encoder.graph, seen)
    encoder.encode(np.zeros(16_000, np.float32), 16_000)
    assert seen and set(seen) == {AVAILABLE}
    assert not are_zero()


def test_opening_the_first_session_of_a_process_leaves_its_thread_alone(tiny_bundle):
    code = (
        "import sys; from pathlib import Path; import numpy as np;"
        "from gemma_edge.runtime.bundle import open_bundle; from gemma_edge.runtime.engine import Engine;"
        "engine = Engine(open_bundle(Path(sys.argv[1])));"
        "assert len(list(engine.generate([30, 31], max_new_tokens=2))) == 2;"
        "sys.exit(not (np.full(8, 1e-39, np.float32) * np.float32(0.5)).all())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_bundle().path)], check=False)
    assert done.returncode == 0
