"""What a generation took and what the process holds in memory; knows nothing of models."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EngineFinish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class GenerationStats:
    """One run of the engine. Times leave out whatever the caller did between two tokens."""

    prompt_tokens: int
    new_tokens: int  # yielded ones: a stop id is not counted
    prefill_s: float  # running the prompt
    ttft_s: float  # from the start until the first token was chosen; 0.0 when none was
    decode_s: float  # all decode steps together
    decode_steps: int  # passes over the model, each for one token and its right guesses
    finish: EngineFinish
    complete_s: float = 0.0  # from the start until the prompt was there whole: a live one arrives slowly
    reused_tokens: int = 0  # of the prompt: in the caches already, or put back into them

    drafted: int = 0  # guesses at tokens that were tried …
    accepted: int = 0  # … and were right

    @property
    def prefill_tokens_per_s(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return (self.decode_steps + self.accepted) / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True)
class MemoryUse:
    """Resident memory of this process. Mapped files count as file-backed: the system can drop them."""

    rss_bytes: int
    anonymous_bytes: int | None  # None where the system does not tell
    file_bytes: int | None

    def __str__(self) -> str:
        parts = [f"{self.rss_bytes / 2**20:.0f} MiB resident"]
        if self.anonymous_bytes is not None and self.file_bytes is not None:
            parts.append(f"{self.anonymous_bytes / 2**20:.0f} anonymous")
            parts.append(f"{self.file_bytes / 2**20:.0f} file-backed")
        return ", ".join(parts)


def memory_use() -> MemoryUse:
    """Memory of this process now (Linux), or its peak where only that is known."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        names = ("VmRSS", "RssAnon", "RssFile")
        kib = {name: int(fields[name].split()[0]) for name in names if name in fields}
        if "VmRSS" in kib:
            anonymous, file = kib.get("RssAnon"), kib.get("RssFile")
            return MemoryUse(
                kib["VmRSS"] * 1024,
                None if anonymous is None else anonymous * 1024,
                None if file is None else file * 1024,
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return MemoryUse(peak if sys.platform == "darwin" else peak * 1024, None, None)


def describe(stats: GenerationStats) -> str:
    """One line for people: prefill and decode speed, time to first token."""
    reused = f" (and {stats.reused_tokens} reused)" if stats.reused_tokens else ""
    guessed = f" ({stats.accepted} of {stats.drafted} guesses right)" if stats.drafted else ""
    run = stats.prompt_tokens - stats.reused_tokens
    return (
        f"prefill {run} tokens{reused}, {stats.prefill_tokens_per_s:.1f} tok/s; "
        f"decode {stats.decode_steps} steps{guessed}, {stats.decode_tokens_per_s:.1f} tok/s; "
        f"time to first token {stats.ttft_s:.3f} s"
    )
