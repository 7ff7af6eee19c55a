"""Text to ids and back with the bundle's SentencePiece model; knows control tokens, not what they mean.

The ids are those of the checkpoint's tokenizer.json. Control tokens (`<bos>`, `<|turn>`, …) are split off
first, the longest match at each place, and the text between them is encoded alone, as Hugging Face does.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from .bundle import Bundle
from .errors import BundleError

MODEL = "tokenizer.model"
_SPACE = "\u2581"  # how pieces write a space


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer."""
    return Tokenizer(bundle.path / MODEL)


class ControlFinder:
    """Where control tokens stand in a text: from the left, the longest at each place."""

    def __init__(self, controls: Iterable[str]) -> None:
        self.controls = frozenset(controls)
        self.lengths = sorted({len(control) for control in self.controls}, reverse=True)
        # Looked up by slices at each possible first character: a checkpoint may have thousands of them.
        starts = "".join(sorted(re.escape(first) for first in {control[0] for control in self.controls}))
        self._starts = re.compile(f"[{starts}]" if starts else "(?!)")

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, end) of every control token."""
        done = 0
        for match in self._starts.finditer(text):
            start = match.start()
            if start < done:
                continue
            for length in self.lengths:
                if text[start : start + length] in self.controls:
                    done = start + length
                    yield start, done
                    break


class Tokenizer:
    """Encodes and decodes. Safe to use from several threads."""

    def __init__(self, model: Path) -> None:
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as cause:
            raise BundleError(f"{model}: no SentencePiece model ({cause}); export it again") from cause
        self.vocab_size: int = self._pieces.get_piece_size()
        is_control, piece = self._pieces.IsControl, self._pieces.IdToPiece
        self.controls: dict[str, int] = {piece(i): i for i in range(self.vocab_size) if is_control(i)}
        if self._pieces.unk_id() >= 0:
            self.controls[piece(self._pieces.unk_id())] = self._pieces.unk_id()
        self._control_ids = frozenset(self.controls.values())
        self._finder = ControlFinder(self.controls)

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Ids of `text`, nothing added. allow_special=False: `<turn|>` in the text is plain characters."""
        if not allow_special:
            return self._encode_plain(text)
        ids: list[int] = []
        for part in self.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._encode_plain(part))
        return ids

    def split(self, text: str) -> Iterator[int | str]:
        """Cut `text` into ids of control tokens and the strings between them; no string is empty."""
        place = 0
        for start, end in self._finder.spans(text):
            if place < start:
                yield text[place:start]
            yield self.controls[text[start:end]]
            place = end
        if place < len(text):
            yield text[place:]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Control tokens are left out, or written as they are called."""
        stream = StreamDecoder(self, skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def is_control(self, token: int) -> bool:
        return token in self._control_ids

    def piece(self, token: int) -> str:
        """The token as the vocabulary writes it. Raises IndexError on an id outside it."""
        return self._pieces.IdToPiece(token)

    def byte(self, token: int) -> int | None:
        """The byte that a byte-fallback token stands for; None for other tokens."""
        return int(self.piece(token)[3:5], 16) if self._pieces.IsByte(token) else None

    def _encode_plain(self, text: str) -> list[int]:
        # A lone surrogate (JSON allows one) has no UTF-8 form.
        return self._pieces.EncodeAsIds(text.encode("utf-8", "replace").decode("utf-8"))


class StreamDecoder:
    """Ids in one by one, text out as soon as it is whole: never half a UTF-8 sequence.

    All that is pushed and flushed adds up to `Tokenizer.decode` of the ids. Bytes that are no UTF-8 become
    U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; often its own, sometimes none."""
        byte = self._tokenizer.byte(token)
        if byte is not None:
            return self._utf8.decode(bytes((byte,)))
        if self._tokenizer.is_control(token):
            return self.flush() + ("" if self._skip_special else self._tokenizer.piece(token))
        return self.flush() + self._tokenizer.piece(token).replace(_SPACE, " ")

    def flush(self) -> str:
        """What is left of an unfinished sequence, as U+FFFD."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
