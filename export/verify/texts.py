"""What is measured on: conversations as token ids, with the tokens that count; knows no model.

In a conversation the model's own answers count. In one without answers, and in plain text, every token does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.bundle import Bundle
from ...runtime.chat import ChatTemplate, load_template
from ...runtime.errors import ConfigError, RequestError
from ...runtime.tokenizer import Tokenizer, load_tokenizer

DEFAULT_TEXTS = Path(__file__).parent / "texts.jsonl"
FILE_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Text:
    """One sequence."""

    name: str  # "line 3" of the file
    ids: tuple[int, ...]
    scored: tuple[int, ...]  # positions of the tokens whose prediction is measured, never 0


def load_texts(path: Path | None, bundle: Bundle, max_tokens: int) -> tuple[list[Text], Tokenizer]:
    """The texts of `path` (default: ours), cut so that they fit the context and `max_tokens` in all.

    Raises ConfigError saying which line cannot be used and why.
    """
    tokenizer = load_tokenizer(bundle)
    texts: list[Text] = []
    left = max_tokens
    for text in _read(path or DEFAULT_TEXTS, bundle, tokenizer, load_template(bundle)):
        length = min(len(text.ids), left, bundle.manifest.caches.context)
        scored = tuple(position for position in text.scored if position < length)
        if scored:
            texts.append(Text(text.name, text.ids[: scored[-1] + 1], scored))
            left -= len(texts[-1].ids)
        if left < 2:
            break
    if not texts:
        raise ConfigError(
            f"{path or DEFAULT_TEXTS}: none of it counts within {max_tokens} tokens and the bundle's context "
            f"of {bundle.manifest.caches.context}; expected conversations with answers, or text"
        )
    return texts, tokenizer


def _read(path: Path, bundle: Bundle, tokenizer: Tokenizer, template: ChatTemplate) -> Iterator[Text]:
    content = _content(path)
    if path.suffix not in (".jsonl", ".json"):
        ids = [bundle.manifest.tokens.bos, *tokenizer.encode(content, allow_special=False)]
        yield Text("text", tuple(ids), tuple(range(1, len(ids))))
        return
    lines = [(1, content)] if path.suffix == ".json" else enumerate(content.splitlines(), start=1)
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            found = json.loads(line)
        except ValueError as cause:
            raise ConfigError(f"{where}: not valid JSON ({cause})") from cause
        if isinstance(found, list):
            found = {"messages": found}
        if not isinstance(found, dict) or not isinstance(found.get("messages"), list):
            raise ConfigError(
                f'{where}: expected an object with "messages", as `gemma-edge ask --json` takes it'
            )
        try:
            yield _conversation(f"line {number}", found, bundle, tokenizer, template)
        except RequestError as cause:
            raise ConfigError(f"{where}: {cause}") from cause


def _content(path: Path) -> str:
    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            raise ConfigError(f"{path}: larger than {FILE_MAX_BYTES >> 20} MiB; a part of it is enough")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({cause})") from cause


def _conversation(
    name: str, found: dict[str, Any], bundle: Bundle, tokenizer: Tokenizer, template: ChatTemplate
) -> Text:
    """The whole conversation; an answer is what it adds to the prompt before it."""
    messages, tools = found["messages"], found.get("tools") or []

    def encode(count: int, prompt: bool) -> list[int]:
        return template.encode(tokenizer, messages[:count], tools, add_generation_prompt=prompt)

    ids = encode(len(messages), False)
    scored: list[int] = []
    for index, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "assistant" and index:
            prompt, answered = encode(index, True), encode(index + 1, False)
            if answered[: len(prompt)] == prompt and ids[: len(answered)] == answered:
                ends = [p for p in range(len(prompt), len(answered)) if ids[p] in bundle.manifest.tokens.eos]
                end = (
                    ends[-1] + 1 if ends else len(answered)
                )  # what the template adds after it is not the model's
                scored.extend(range(len(prompt), end))
    return Text(name, tuple(ids), tuple(scored) or tuple(range(1, len(ids))))
