"""A daemon whose engine answers by script, under the real service and transports: for protocol tests.

As a program: `python -m tests.support.scripted_daemon [--step-s S] [options of serve]`.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from gemma_edge.runtime.chat import ChatTemplate
from gemma_edge.runtime.engine import CancelSignal
from gemma_edge.runtime.sampler import SamplingParams
from gemma_edge.runtime.serve import Daemon, add_serve_arguments, settings_from
from gemma_edge.runtime.service import Service
from gemma_edge.runtime.stats import EngineFinish, GenerationStats
from gemma_edge.runtime.tokenizer import Tokenizer

MODEL_NAME = "scripted"
CONTEXT = 2048  # tokens
CONTROLS = '<|turn> <turn|> <|channel> <channel|> <|tool_call> <tool_call|> <|"|>'.split()
TEMPLATE = """\
{{- '<bos>' -}}
{%- for tool in tools or [] -%}{{- '<|turn>system\\n' + tool.function.name + '<turn|>\\n' -}}{%- endfor -%}
{%- for message in messages -%}
{{- '<|turn>' + message.role + '\\n' + (message.content or '') + '<turn|>\\n' -}}
{%- endfor -%}
{{- '<|turn>model\\n' + ('<|channel>' if enable_thinking else '') -}}
"""


def scripted_reply(prompt: str) -> str:
    """The answer to a last message `repeat N WORD`, `call NAME`, `think` or `fail`; else an echo."""
    last = re.findall(r"<\|turn>(?:user|tool)\n(.*?)<turn\|>", prompt, re.DOTALL)
    text = last[-1] if last else ""
    if match := re.fullmatch(r"repeat (\d+) (\S+)", text):
        return f"{match[2]} " * int(match[1])
    if match := re.fullmatch(r"call (\w+)", text):
        return f'<|tool_call>call:{match[1]}{{room:<|"|>kitchen<|"|>,on:true}}<tool_call|>'
    if text == "think":
        return "<|channel>thought\nIt is simple.<channel|>Done."
    if text == "fail":
        raise RuntimeError("the script says: fail")
    return f"You said: {text}"


class ReplyEngine:
    """Yields the ids of `scripted_reply(prompt)`, one each `step_s`."""

    def __init__(self, tokenizer: Tokenizer, step_s: float) -> None:
        self.context = CONTEXT
        self.eos = frozenset({tokenizer.controls["<eos>"], tokenizer.controls["<turn|>"]})
        self.last_stats: GenerationStats | None = None
        self.seen: list[
            tuple[str, SamplingParams, int]
        ] = []  # prompt, params, max_new_tokens of every request
        self._tokenizer = tokenizer
        self._step_s = step_s

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_new_tokens: int,
        cancel: CancelSignal | None = None,
    ) -> Iterator[int]:
        prompt = self._tokenizer.decode(prompt_ids, skip_special=False)
        self.seen.append((prompt, params, max_new_tokens))
        started = time.monotonic()
        count = 0
        finish: EngineFinish = "stop"
        try:
            for token in self._tokenizer.encode(scripted_reply(prompt)):
                if cancel is not None and cancel.is_set():
                    finish = "cancelled"
                    return
                if count == max_new_tokens:
                    finish = "length"
                    return
                time.sleep(self._step_s)
                count += 1
                yield token
        finally:
            took_s = time.monotonic() - started
            self.last_stats = GenerationStats(
                len(prompt_ids), count, 0.0, self._step_s, took_s, count, finish
            )


def small_tokenizer(folder: Path) -> Tokenizer:
    """A real SentencePiece BPE model with byte fallback and Gemma's control tokens, trained on the spot."""
    words = "You said: hello kitchen repeat word temperature sensor is high low call think light 12 21.5 C"
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([words] * 20),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        control_symbols=CONTROLS,
        bos_piece="<bos>",
        eos_piece="<eos>",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return Tokenizer(prefix.with_suffix(".model"))


def scripted_service(
    folder: Path, *, queue_size: int = 8, step_s: float = 0.0, max_answer_tokens: int | None = None
) -> tuple[Service, ReplyEngine]:
    """The real service on a scripted engine; `folder` gets the tokenizer's files."""
    tokenizer = small_tokenizer(folder)
    engine = ReplyEngine(tokenizer, step_s)
    service = Service(
        engine,
        tokenizer,
        ChatTemplate(TEMPLATE),
        model_name=MODEL_NAME,
        queue_size=queue_size,
        max_answer_tokens=max_answer_tokens,
    )
    return service, engine


def main() -> int:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    parser.add_argument("--step-s", type=float, default=0.0)
    args = parser.parse_args(["no-bundle", *sys.argv[1:]])
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")

    def load() -> Service:
        options = dict(queue_size=args.queue_size, step_s=args.step_s, max_answer_tokens=args.max_tokens)
        return scripted_service(Path(folder), **options)[0]

    with tempfile.TemporaryDirectory() as folder, Daemon(settings_from(args)) as daemon:
        return daemon.run(load)


if __name__ == "__main__":
    sys.exit(main())
