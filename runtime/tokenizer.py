"""Text to ids and back with the bundle's token table; knows control tokens, not what they mean.

The ids are those of the checkpoint's tokenizer.json. Control tokens (`<bos>`, `<|turn>`, …) are split off
first, the longest match at each place, and the text between them is encoded alone, as Hugging Face does.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from .bpe import SPACE, ControlFinder, TokenTable
from .bundle import Bundle
from .errors import BundleError

__all__ = ["ControlFinder", "StreamDecoder", "Tokenizer", "load_tokenizer"]

TABLE = "tokenizer.table"
MODEL = "tokenizer.model"  # of bundles that were exported before there were token tables


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer."""
    return Tokenizer(bundle.path / (TABLE if TABLE in bundle.manifest.files else MODEL))


class Pieces(Protocol):
    """A vocabulary and its BPE."""

    vocab_size: int
    unknown: int  # below 0: none
    controls: tuple[int, ...]

    def piece(self, token: int) -> str: ...

    def byte(self, token: int) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...


class Tokenizer:
    """Encodes and decodes. Safe to use from several threads."""

    def __init__(self, file: Path) -> None:
        """file: a token table, or a SentencePiece model (`.model`)."""
        self._pieces: Pieces = _SentencePiece(file) if file.suffix == ".model" else TokenTable(file)
        self.vocab_size: int = self._pieces.vocab_size
        self.controls: dict[str, int] = {self._pieces.piece(i): i for i in self._pieces.controls}
        if self._pieces.unknown >= 0:
            self.controls[self._pieces.piece(self._pieces.unknown)] = self._pieces.unknown
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
        return self._pieces.piece(token)

    def byte(self, token: int) -> int | None:
        """The byte that a byte-fallback token stands for; None for other tokens."""
        return self._pieces.byte(token)

    def _encode_plain(self, text: str) -> list[int]:
        # A lone surrogate (JSON allows one) has no UTF-8 form.
        return self._pieces.encode(text.encode("utf-8", "replace").decode("utf-8"))


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
        return self.flush() + self._tokenizer.piece(token).replace(SPACE, " ")

    def flush(self) -> str:
        """What is left of an unfinished sequence, as U+FFFD."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class _SentencePiece:
    """A SentencePiece model as `Pieces`."""

    def __init__(self, model: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as cause:
            raise BundleError(f"{model}: no SentencePiece model ({cause}); export it again") from cause
        self.vocab_size: int = self._model.get_piece_size()
        self.unknown: int = self._model.unk_id()
        self.controls = tuple(i for i in range(self.vocab_size) if self._model.IsControl(i))

    def piece(self, token: int) -> str:
        return self._model.IdToPiece(token)

    def byte(self, token: int) -> int | None:
        return int(self.piece(token)[3:5], 16) if self._model.IsByte(token) else None

    def encode(self, text: str) -> list[int]:
        return self._model.EncodeAsIds(text)
