"""Cuts an answer into sentences while it is being written, so that the first can be spoken at once."""

from __future__ import annotations

import re

LONGEST = 240  # characters; a longer sentence is cut at a comma or a space
# An end mark, closing quotes and brackets, and white space after them; a dot within a number is none.
_END = re.compile(r"""[.!?…]+["'”’)\]]*(?=\s)|[。！？]+[」』）]*|\n+""")
_SHORT_FORMS = re.compile(r"(?:^|[\s(])(?:[A-Za-z]|Dr|Mr|Mrs|Ms|St|No|vs|etc|approx|e\.g|i\.e)\.$")
_NOT_SPOKEN = re.compile(r"[*_`#|<>~]+|^\s*[-•]\s+", re.MULTILINE)


class Sentences:
    """Text in, whole sentences out."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str) -> list[str]:
        """The sentences that are complete now."""
        self._text += text
        found = []
        start = 0
        for match in _END.finditer(self._text):
            sentence = self._text[start : match.end()]
            if _SHORT_FORMS.search(sentence):
                continue
            found.append(sentence)
            start = match.end()
        self._text = self._text[start:]
        while len(self._text) > LONGEST:
            cut = max(self._text.rfind(mark, 0, LONGEST) for mark in (", ", "; ", ": ")) + 1
            cut = cut or self._text.rfind(" ", 0, LONGEST) + 1 or LONGEST
            found.append(self._text[:cut])
            self._text = self._text[cut:]
        return [sentence.strip() for sentence in found if sentence.strip()]

    def finish(self) -> list[str]:
        """What is left."""
        rest, self._text = self._text.strip(), ""
        return [rest] if rest else []


def speakable(sentence: str) -> str:
    """A sentence without what only a screen shows; empty if nothing can be said."""
    text = " ".join(_NOT_SPOKEN.sub(" ", sentence).split())
    return text if re.search(r"\w", text) else ""
