"""Test tokenizers as both sides see them: Hugging Face's, and ours on the exported token table."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import tokenizers

from gemma_edge.export.token_table import write_token_table
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
        table = Path(folder) / "tokenizer.table"
        write_token_table(source, table)
        return tokenizers.Tokenizer.from_file(str(source)), Tokenizer(table)
