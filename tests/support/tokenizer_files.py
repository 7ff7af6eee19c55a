"""Test tokenizers as both sides see them: Hugging Face's, and ours on the exported SentencePiece model."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import tokenizers

from gemma_edge.export.sentencepiece_model import write_sentencepiece_model
from gemma_edge.runtime.tokenizer import Tokenizer

from .tiny_checkpoint import train_tokenizer

NANO = Path(__file__).parents[2] / "models" / "nano" / "tokenizer.json"


@functools.cache
def tokenizer_pair(name: str) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    """(Hugging Face, ours) for "tiny" or "nano"."""
    with tempfile.TemporaryDirectory() as folder:
        source = NANO
        if name == "tiny":
            source = Path(folder) / "tokenizer.json"
            train_tokenizer(512).save(str(source))
        model = Path(folder) / "tokenizer.model"
        write_sentencepiece_model(source, model)
        return tokenizers.Tokenizer.from_file(str(source)), Tokenizer(model)
