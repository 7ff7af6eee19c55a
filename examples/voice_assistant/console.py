"""What the assistant prints: each turn as it happens, and its latency. Knows no model and no sound."""

from __future__ import annotations

import sys
import threading
from typing import TextIO

from .turn import Call, Turn


class Console:
    """Prints turns, one whole line at a time."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stdout
        self._lock = threading.Lock()

    def heard(self, turn: Turn) -> None:
        if turn.spoken is None:
            self._print(f"[{turn.number}] you: {turn.text}")
        else:
            again = " (with what was said before)" if turn.before else ""
            self._print(f"[{turn.number}] you: {turn.speech_s:.1f} s of speech{again}")

    def called(self, turn: Turn, call: Call) -> None:
        arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
        mark = "->" if call.outcome.ok else "!!"
        self._print(f"    {call.name}({arguments}) {mark} {call.outcome.done}")

    def sentence(self, turn: Turn, text: str) -> None:
        self._print(f"    assistant: {text}")

    def finished(self, turn: Turn) -> None:
        if turn.error is not None:
            self._print(f"    error: {turn.error}")
            return
        if turn.interrupted:
            self._print(f"    (interrupted after: {turn.said or 'nothing'})")
        elif not turn.answer and not turn.calls:
            self._print("    (no answer)")
        if turn.is_cut:
            self._print("    (the answer reached its longest)")
        if turn.spoken is not None and turn.text:
            self._print(f"    heard: {turn.text}")
        self._print(f"    {latency(turn)}")

    def _print(self, line: str) -> None:
        with self._lock:
            print(line, file=self._file, flush=True)


def latency(turn: Turn) -> str:
    """One line: what the user waited for, from the end of the turn."""
    parts = [f"end of turn to first token {_ms(turn.token_s)}", f"to first sound {_ms(turn.sound_s)}"]
    if turn.prompt_tokens:
        reused = f", {turn.reused_tokens} reused" if turn.reused_tokens else ""
        parts.append(f"prompt {turn.prompt_tokens} tokens{reused}")
    parts.append(f"done {_ms(turn.done_at - turn.ended_at)}")
    return "; ".join(parts)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
