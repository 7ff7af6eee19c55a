"""Generates a BPE tokenizer of Gemma's kind and size, with Gemma 4's ids for what has a meaning.

Its words are made of syllables, so that every piece has merges that make it, as in a trained tokenizer:
consonant + vowel, two syllables, three syllables, and the same after `▁`. It costs what the real one costs to
convert, load and use, and means nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPACE = "▁"
VOCABULARY = 262144
CONTROLS = {
    0: "<pad>",
    1: "<eos>",
    2: "<bos>",
    3: "<unk>",
    4: "<mask>",
    46: "<|tool>",
    47: "<tool|>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    50: "<|tool_response>",
    51: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    105: "<|turn>",
    106: "<turn|>",
    255999: "<|image>",
    256000: "<|audio>",
    258880: "<|image|>",
    258881: "<|audio|>",
    258882: "<image|>",
    258883: "<audio|>",
    258884: "<|video|>",
}
FIRST_BYTE = 238
CONSONANTS = "bcdfghjklmnpqrstvwxz"
VOWELS = "aeiouy"
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
{{- message.content | trim + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def write_tokenizer(folder: Path, size: int = VOCABULARY) -> None:
    """tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja."""
    controls = {index: piece for index, piece in CONTROLS.items() if index < size}
    _write(folder / "tokenizer.json", tokenizer_json(size))
    named = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    _write(
        folder / "tokenizer_config.json",
        dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=131072) | named,
    )
    stops = [index for index in (1, 106, 50) if index in controls]
    sampling = dict(do_sample=True, temperature=1.0, top_k=64, top_p=0.95)
    _write(
        folder / "generation_config.json", dict(bos_token_id=2, pad_token_id=0, eos_token_id=stops) | sampling
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def tokenizer_json(size: int = VOCABULARY) -> dict[str, Any]:
    """The content of a tokenizer.json with `size` entries."""
    pieces: dict[int, str] = {index: piece for index, piece in CONTROLS.items() if index < size}
    pieces |= {FIRST_BYTE + byte: f"<0x{byte:02X}>" for byte in range(256)}
    added = set(pieces[index] for index in CONTROLS if index < size)
    words = _words()
    for index in range(size):
        if index in pieces:
            continue
        if index < FIRST_BYTE:
            pieces[index] = f"<unused{index}>"
            added.add(pieces[index])
        else:
            pieces[index] = next(words)
    vocabulary = {pieces[index]: index for index in range(size)}
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[
            dict(id=vocabulary[piece], content=piece, single_word=False, lstrip=False, rstrip=False)
            | dict(normalized=False, special=True)
            for piece in sorted(added, key=vocabulary.__getitem__)
        ],
        normalizer=dict(type="Replace", pattern=dict(String=" "), content=SPACE),
        pre_tokenizer=dict(
            type="Split", pattern=dict(String=" "), behavior="MergedWithPrevious", invert=False
        ),
        post_processor=None,
        decoder=dict(
            type="Sequence",
            decoders=[
                dict(type="Replace", pattern=dict(String=SPACE), content=" "),
                dict(type="ByteFallback"),
                dict(type="Fuse"),
            ],
        ),
        model=dict(
            type="BPE",
            dropout=None,
            unk_token="<unk>",
            continuing_subword_prefix=None,
            end_of_word_suffix=None,
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=False,
            vocab=vocabulary,
            merges=_merges(vocabulary),
        ),
    )


def _words() -> Iterator[str]:
    """Pieces in the order of their merges: characters first, then ever longer ones, more than enough."""
    yield from (chr(code) for code in range(33, 127))
    yield from ("\n", "\t", SPACE)
    yield from (
        chr(code) for block in ((0xA1, 0x17F), (0x391, 0x3C9), (0x410, 0x44F)) for code in range(*block)
    )
    yield from (chr(code) for code in range(0x4E00, 0x9000))
    syllables = ["".join(pair) for pair in itertools.product(CONSONANTS, VOWELS)]
    yield from syllables
    yield from (SPACE + syllable for syllable in syllables)
    pairs = ["".join(pair) for pair in itertools.product(syllables, syllables)]
    yield from pairs
    yield from (SPACE + pair for pair in pairs)
    for pair, syllable in itertools.product(pairs, syllables):
        yield pair + syllable
        yield SPACE + pair + syllable


def _merges(vocabulary: dict[str, int]) -> list[list[str]]:
    """All ways to make each piece from two others, piece by piece."""
    merges: list[list[str]] = []
    for piece in vocabulary:
        if piece.startswith("<"):
            continue
        merges += [
            [piece[:cut], piece[cut:]]
            for cut in range(1, len(piece))
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary
        ]
    return merges


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
