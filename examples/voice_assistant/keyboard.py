"""The keyboard of a terminal: lines are typed turns, Enter alone is the button of push-to-talk."""

from __future__ import annotations

import queue
import sys
import threading
from typing import TextIO

MAX_LINE = 2000  # characters
MAX_LINES = 64  # waiting


class Keyboard:
    """Reads lines in a thread of its own. closed: there are no more."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stdin
        self._lines: queue.Queue[str] = queue.Queue(MAX_LINES)
        self._is_down = False
        self.closed = threading.Event()
        threading.Thread(target=self._read, name="keyboard", daemon=True).start()

    def is_down(self) -> bool:
        """Whether the button is down: Enter presses it, Enter again lets it go."""
        return self._is_down

    def line(self) -> str | None:
        """A typed line, if there is one."""
        try:
            return self._lines.get_nowait()
        except queue.Empty:
            return None

    def wait_line(self) -> str | None:
        """The next line; None when there are no more."""
        while True:
            try:
                return self._lines.get(timeout=0.1)
            except queue.Empty:
                if self.closed.is_set() and self._lines.empty():
                    return None

    def _read(self) -> None:
        try:
            for line in self._file:
                text = line.strip()[:MAX_LINE]
                if text:
                    self._lines.put(text)
                else:
                    self._is_down = not self._is_down
        except (OSError, ValueError):  # it was closed
            pass
        finally:
            self._is_down = False
            self.closed.set()
