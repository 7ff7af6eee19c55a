"""Processes that work on pieces of weights, one for each core; threads would wait for the interpreter's lock.

A worker is `python -m gemma_edge.export.workers`: pickled pieces come in on standard input, results or errors
go out on standard output. It imports numpy, not torch, and ends when its input does.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, cast

from ..runtime.errors import GemmaEdgeError
from .pieces import ChannelPiece, Done, Piece, process

WAITING_PER_WORKER = 2  # pieces handed out before their turn


class WorkerError(GemmaEdgeError):
    """A worker ended before its time."""


class Workers:
    """`count` processes; they are gone when the `with` block ends, however it ends."""

    def __init__(self, count: int) -> None:
        self._processes = [_start() for _ in range(count)]
        self._free = deque(self._processes)
        self._threads = ThreadPoolExecutor(count, "export-worker")

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # the rest is of no use to anyone
            for process_ in self._processes:
                process_.kill()
        self._threads.shutdown(cancel_futures=True)
        for process_ in self._processes:
            process_.communicate()

    def map(self, pieces: Iterable[tuple[str, Piece | ChannelPiece]]) -> Iterator[tuple[str, Done]]:
        """What `process` gives for each piece, in order, beside the name that came with it."""
        waiting: deque[tuple[str, Future[Done]]] = deque()
        for name, piece in pieces:
            waiting.append((name, self._threads.submit(self._ask, piece)))
            if len(waiting) >= (1 + WAITING_PER_WORKER) * len(self._processes):
                first, future = waiting.popleft()
                yield first, future.result()
        for name, future in waiting:
            yield name, future.result()

    def _ask(self, piece: Piece | ChannelPiece) -> Done:
        worker = self._free.popleft()  # there are as many threads as workers
        try:
            pickle.dump(piece, cast(BinaryIO, worker.stdin))
            cast(BinaryIO, worker.stdin).flush()
            answer = pickle.load(cast(BinaryIO, worker.stdout))
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as cause:
            raise WorkerError(
                f"a process that quantizes weights ended with status {worker.wait()} at "
                f"{piece.name}; it may have been killed for want of memory"
            ) from cause
        finally:
            self._free.append(worker)
        if isinstance(answer, BaseException):
            raise answer
        return cast(Done, answer)


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the parent, which then ends its workers
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OPENBLAS_NUM_THREADS": "1"},
    )


def main() -> None:
    while True:
        try:
            piece = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: Done | Exception
        try:
            answer = process(piece)
        except Exception as error:
            answer = error
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
