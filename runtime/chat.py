"""Messages to prompt ids through the checkpoint's own chat template; knows jinja, not what the template says.

    messages, tools --normalise--> --guard--> template (sandboxed) --split at control tokens--> ids

The guard is what keeps a literal `<turn|>` that a user typed from becoming a control token: see `Guard`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .bundle import Bundle
from .errors import BundleError, RequestError
from .messages import fold_tool_results, normalise_messages, normalise_tools, parse_tool_results
from .tokenizer import ControlFinder, Tokenizer

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"

# What a template's expressions raise on messages that it was not made for.
_DATA_ERRORS = (TypeError, ValueError, KeyError, AttributeError, RecursionError)
_PRIVATE_FIRST, _PRIVATE_LAST = 0x100000, 0x10FFFD  # plane 16, for private use
_PRIVATE = re.compile(f"[{chr(_PRIVATE_FIRST)}-{chr(_PRIVATE_LAST)}]")


def load_template(bundle: Bundle) -> ChatTemplate:
    """The bundle's chat template with the special token names that it may use."""
    path = bundle.path / TEMPLATE
    try:
        source = path.read_text(encoding="utf-8")
        config = msgspec.json.decode((bundle.path / TOKENIZER_CONFIG).read_bytes())
    except (OSError, msgspec.DecodeError) as cause:
        raise BundleError(f"{bundle.path}: no readable chat template ({cause}); export it again") from cause
    try:
        return ChatTemplate(source, special_tokens(config))
    except jinja2.TemplateSyntaxError as cause:
        raise BundleError(f"{path}: line {cause.lineno}: {cause.message}") from cause


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, … as templates see them."""
    tokens = {}
    for name, value in tokenizer_config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


class ChatTemplate:
    """A compiled template. Rendering equals transformers' `apply_chat_template` on the same messages."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        self._template = _environment().from_string(source)
        self._tokens = dict(tokens or {})
        # Where a template looks for a tool's result: in the message that called it, or in one of its own,
        # there as a mapping if it tests for one.
        self._folds_tool_results = "tool_responses" in source
        self._parses_tool_results = "content is mapping" in source

    def normalise(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """OpenAI messages in the shape this template reads. Raises RequestError("invalid_request")."""
        checked = normalise_messages(messages)
        if self._folds_tool_results:
            return fold_tool_results(checked)
        return parse_tool_results(checked) if self._parses_tool_results else checked

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = True,
        enable_thinking: bool = False,
    ) -> str:
        """The prompt as one string, from OpenAI messages. Raises RequestError("invalid_request")."""
        checked = self.normalise(messages)
        return self._render(checked, normalise_tools(tools), add_generation_prompt, enable_thinking)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = True,
        enable_thinking: bool = False,
    ) -> list[int]:
        """The prompt's ids: control tokens come from the template only, never from a message or a tool.

        The ids of `render`'s string, if no message or tool holds a control token's text.
        """
        guard = Guard(tokenizer.controls)
        hidden = guard.hide(self.normalise(messages))
        text = self._render(
            hidden, guard.hide(normalise_tools(tools)), add_generation_prompt, enable_thinking
        )
        ids: list[int] = []
        for part in tokenizer.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(tokenizer.encode(guard.restore(part), allow_special=False))
        return ids

    def _render(self, messages: Any, tools: Any, add_generation_prompt: bool, enable_thinking: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
                **self._tokens,
            )
        except (jinja2.TemplateError, *_DATA_ERRORS) as cause:
            raise RequestError(
                "invalid_request", f"the chat template refuses these messages: {cause}"
            ) from cause


class Guard:
    """Replaces control tokens in untrusted strings by private-use characters, and puts the text back later.

    A hidden string never completes a control token: whole ones are replaced, and so are their beginnings at a
    string's end and their ends at a string's start (`<turn` + `|>` from two fields). All other text is
    untouched: the template's own tests and trims see what they would have seen. One character stands for a
    text.
    """

    def __init__(self, controls: Iterable[str]) -> None:
        self._finder = ControlFinder(controls)
        self._heads = frozenset(c[:n] for c in self._finder.controls for n in range(1, len(c)))
        self._tails = frozenset(c[-n:] for c in self._finder.controls for n in range(1, len(c)))
        self._codes: dict[str, int] = {}  # hidden text -> private-use code point
        self._texts: dict[int, str] = {}

    def hide(self, value: Any) -> Any:
        """A copy of a JSON value with every string in it made harmless, keys too."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def restore(self, text: str) -> str:
        """The text with the hidden parts as they were."""
        return text.translate(self._texts) if self._texts else text

    def _hide_text(self, text: str) -> str:
        text = _PRIVATE.sub(lambda match: self._code(match[0]), text)
        pieces: list[str] = []
        place = 0
        for start, end in self._finder.spans(text):
            pieces += text[place:start], self._code(text[start:end])
            place = end
        return self._hide_edges("".join([*pieces, text[place:]]))

    def _hide_edges(self, text: str) -> str:
        """Hide the part of a control token at either end, also where only white space is outside it."""
        longest = max(self._finder.lengths, default=0)
        body = text.rstrip()
        for length in range(min(longest, len(body)), 0, -1):
            if body[-length:] in self._heads:
                text = body[:-length] + self._code(body[-length:]) + text[len(body) :]
                break
        body = text.lstrip()
        for length in range(min(longest, len(body)), 0, -1):
            if body[:length] in self._tails:
                return text[: len(text) - len(body)] + self._code(body[:length]) + body[length:]
        return text

    def _code(self, hidden: str) -> str:
        code = self._codes.get(hidden)
        if code is None:
            code = _PRIVATE_FIRST + len(self._codes)
            if code > _PRIVATE_LAST:
                raise RequestError("invalid_request", "too many different private-use characters")
            self._codes[hidden] = code
            self._texts[code] = hidden
        return chr(code)


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives to templates, and nothing more."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks text for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own attribute)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Dict:
    """`dict(…)` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(…)` that takes no names of Python's inside."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name in the template, too
        jinja2.utils.Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_namespace_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_namespace_name(name)
        super().__setitem__(name, value)


def _check_namespace_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
