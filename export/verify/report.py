"""The result of a verification: checks with a measured value and a bound, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

NAMED_DIFFERENCES = 5  # printed; JSON has all of them


@dataclass(frozen=True)
class Check:
    """One line of the table. passed: None where there is no bound, only a figure."""

    name: str
    measured: str
    bound: str
    passed: bool | None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NamedDifference:
    """A token that the bundle would choose differently, in words."""

    text: str
    position: int
    reference: str
    bundle: str
    gap: float  # nats
    near_tie: bool


@dataclass(frozen=True)
class Verification:
    """Everything that was found out."""

    bundle: str
    model: str
    recipe: str
    limits: str  # name of the class
    texts: int
    tokens: int
    scored: int
    checks: list[Check]
    differences: list[NamedDifference]
    seconds: dict[str, float]
    peak_rss_bytes: int

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)


def table(found: Verification) -> str:
    """Several lines of text."""
    lines = [
        f"{found.bundle} ({found.recipe}) against {found.model}",
        f"{found.texts} texts, {found.tokens} tokens, {found.scored} of them count; "
        f"bounds of class {found.limits}",
        "",
    ]
    words = {True: "ok", False: "NOT OK", None: ""}
    rows = [("", "measured", "bound", "")]
    rows += [(check.name, check.measured, check.bound, words[check.passed]) for check in found.checks]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in rows
    ]
    for is_tie, title in ((False, "other tokens"), (True, "near-ties")):
        chosen = [difference for difference in found.differences if difference.near_tie is is_tie]
        if chosen:
            lines += ["", f"{title}: reference → bundle, gap in nats"]
            lines += [f"  {_named(difference)}" for difference in chosen[:NAMED_DIFFERENCES]]
        if len(chosen) > NAMED_DIFFERENCES:
            lines.append(f"  and {len(chosen) - NAMED_DIFFERENCES} more")
    lines += ["", f"verdict: {'ok' if found.passed else 'NOT OK: ' + ', '.join(_failed(found))}"]
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.seconds.items())
    lines.append(f"{took}; peak memory {found.peak_rss_bytes / 2**20:.0f} MiB")
    return "\n".join(lines)


def as_json(found: Verification) -> dict[str, Any]:
    return {"passed": found.passed, **asdict(found)}


def _failed(found: Verification) -> list[str]:
    return [check.name for check in found.checks if check.passed is False]


def _named(difference: NamedDifference) -> str:
    return (
        f"{difference.text}, token {difference.position}: {difference.reference!r} → {difference.bundle!r}, "
        f"{difference.gap:.4f}"
    )
