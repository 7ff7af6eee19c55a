"""The nano model's tokenizer: Gemma's kind (BPE on "▁"-escaped text, byte fallback, digits apart).

python -m gemma_edge.examples.nano_model.tokenizer OUT
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from .corpus import compile_template, random_dialogue

VOCAB_SIZE = 4096
SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<unk>"),
    *("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
    *("<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>", "<|video|>"),
)
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
# Merges stay inside words, single digits, line ends, or runs of signs.
_PIECES = Regex(r"▁?\p{L}+|\p{N}|\n|[^\p{L}\p{N}▁\n]+|▁")


def train_tokenizer(dialogues: int = 30_000, seed: int = 1) -> Tokenizer:
    """Learn the merges from `dialogues` random training dialogues."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_PIECES, "isolated")
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=tokens,
        show_progress=False,
        min_frequency=3,
        max_token_length=24,
    )
    tokenizer.train_from_iterator(_texts(dialogues, seed), trainer)
    return _as_gemma(tokenizer)


def _as_gemma(trained: Tokenizer) -> Tokenizer:
    """The same merges with Gemma's pipeline. The split was needed to learn them, not to apply them."""
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(BPE(model["vocab"], merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def _texts(dialogues: int, seed: int) -> Iterator[str]:
    template = compile_template(TEMPLATE.read_text(encoding="utf-8"))
    rng = random.Random(seed)
    for _ in range(dialogues):
        messages, tools = random_dialogue(rng)
        text = template.render(
            messages=messages, tools=tools or None, bos_token="", add_generation_prompt=False
        )
        for token in SPECIAL:
            text = text.replace(token, "\n")
        yield text
    # Every letter and sign of plain English, so that bytes are left for what is truly foreign.
    yield from (chr(code) for code in range(33, 127) for _ in range(5))


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja as Hugging Face loads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    write_tokenizer(parser.parse_args().out, train_tokenizer())


if __name__ == "__main__":
    main()
