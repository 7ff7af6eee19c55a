"""A cancel signal for tests of what happens in the middle."""

from __future__ import annotations


class SetAfter:
    """A cancel signal that is set after being asked some times."""

    def __init__(self, times: int) -> None:
        self.left = times

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0
