"""`gemma-edge ask`: one answer from the command line, streamed to stdout; logs and figures go to stderr."""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RequestError
from .options import add_engine_arguments, open_engine
from .start import add_start_arguments, load_prepared

if TYPE_CHECKING:
    from .bundle import Bundle
    from .engine import Engine
    from .genai_engine import GenaiEngine
    from .service import ChatRequest, Done, Service
    from .tokenizer import Tokenizer

# On two CPUs the decoder graph runs so short a prompt before the prefill graph is open (docs/decisions.md).
SHORT_PROMPT_TOKENS = 64
_CHARACTERS = 8 * SHORT_PROMPT_TOKENS  # of a longer one the tokens need not be counted


def add_ask_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ask`."""
    parser.add_argument("bundle", type=Path, help="folder made by `gemma-edge export`")
    parser.add_argument("prompt", nargs="?", help='the question; "-" reads it from stdin')
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help='messages instead: a list, or an object with "messages" and "tools"; "-" reads stdin',
    )
    parser.add_argument("--system", help="system prompt")
    parser.add_argument(
        "--audio",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a sound that the model hears after the prompt; may be repeated, and need no prompt",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: what fits)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument("--think", action="store_true", help="let the model think first; shown on stderr")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="draw from the K likeliest tokens (default: all)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens that hold this probability"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="drop tokens below this share of the likeliest one's probability",
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1 avoids tokens seen before"
    )
    parser.add_argument("--seed", type=int, help="makes a drawn answer repeatable")
    parser.add_argument("--timeout", type=float, metavar="S", help="give up after this many seconds")
    parser.add_argument("--threads", type=int, help="default: as the bundle's device profile says")
    add_engine_arguments(parser)
    add_start_arguments(parser)
    parser.add_argument("--stats", action="store_true", help="print speed and memory to stderr")


def run_ask(args: argparse.Namespace) -> int:
    """Answer and return the exit status: 0 also for an answer cut at --max-tokens."""
    from .bundle import open_bundle

    messages, tools = _messages(args)
    start = time.perf_counter()
    bundle = open_bundle(args.bundle)
    asked = json.dumps([messages, tools], ensure_ascii=False)
    engine, service = load_prepared(bundle, args, lambda ready: _load(ready, args, asked))
    load_s = time.perf_counter() - start
    request = _request(args, messages, tools)
    with service:
        done = _print_answer(service, request)
    engine.close()
    if args.stats:
        _print_stats(done, load_s)
    return 0


def _load(bundle: Bundle, args: argparse.Namespace, asked: str) -> tuple[Engine | GenaiEngine, Service]:
    """The engine loads in a thread; what else is needed is imported and loaded in the meantime.

    asked: the one request that there will be, in JSON, which takes about as many tokens as the prompt.
    """
    from .tokenizer import load_tokenizer

    tokenizer = load_tokenizer(bundle)
    if _is_short(asked, tokenizer):
        bundle = bundle.without_prefill()
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(open_engine, bundle, args, tokenizer, reuse=False, hears=bool(args.audio))
        from .chat import load_template
        from .service import Service
        from .sounds import open_ears

        template = load_template(bundle)
        ears = open_ears(bundle, threads=args.threads) if args.audio else None
        engine = opening.result()
    return engine, Service(engine, tokenizer, template, model_name=bundle.name, ears=ears)


def _is_short(asked: str, tokenizer: Tokenizer) -> bool:
    return len(asked) <= _CHARACTERS and len(tokenizer.encode(asked)) <= SHORT_PROMPT_TOKENS


def _request(
    args: argparse.Namespace, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> ChatRequest:
    from .sampler import SamplingParams
    from .service import ChatRequest

    return ChatRequest(
        messages,
        tools,
        enable_thinking=args.think,
        params=SamplingParams(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            seed=args.seed,
        ),
        max_tokens=args.max_tokens,
        stop=tuple(args.stop),
        timeout_s=args.timeout,
    )


def _messages(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and tools from --json, or from the prompt and --system."""
    spoken = bool(args.audio) and args.prompt is None
    if (args.prompt is None) == (args.json is None) and not (spoken and args.json is None):
        raise RequestError("invalid_request", "give either a prompt or --json FILE")
    if args.json is not None and args.audio:
        raise RequestError("invalid_request", "--audio: with --json, put the sounds into the messages")
    if args.json is None:
        text = sys.stdin.read() if args.prompt == "-" else args.prompt
        content = [{"type": "text", "text": text}] if text else []
        content += [_sound_part(path) for path in args.audio]
        messages = [{"role": "user", "content": content if args.audio else text}]
        tools: list[dict[str, Any]] = []
    else:
        try:
            data = json.loads(
                sys.stdin.read() if str(args.json) == "-" else args.json.read_text(encoding="utf-8")
            )
        except (OSError, ValueError) as cause:
            raise RequestError(
                "invalid_request", f"--json {args.json}: not readable as JSON ({cause})"
            ) from cause
        if isinstance(data, list):
            data = {"messages": data}
        if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
            raise RequestError(
                "invalid_request",
                f'--json {args.json}: expected a list of messages, or an object with "messages"',
            )
        messages, tools = data["messages"], data.get("tools") or []
    if args.system is not None:
        messages = [{"role": "system", "content": args.system}, *messages]
    return messages, tools


def _sound_part(path: Path) -> dict[str, Any]:
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as cause:
        raise RequestError("invalid_request", f"--audio {path}: {cause.strerror}") from cause
    return {"type": "input_audio", "input_audio": {"data": data, "format": path.suffix.lstrip(".")}}


def _print_answer(service: Service, request: ChatRequest) -> Done:
    """Stream the answer. Raises RequestError if it fails."""
    from .service import Done, Failed, ReasoningDelta, TextDelta

    wrote = thought = False
    for event in service.submit(request).events():
        if isinstance(event, Failed):
            raise RequestError(event.code, event.message)
        if isinstance(event, Done):
            if wrote:
                print()
            return event
        if isinstance(event, ReasoningDelta):
            thought = True
            print(event.text, end="", file=sys.stderr, flush=True)
            continue
        if thought:
            thought = False
            print(file=sys.stderr)
        if isinstance(event, TextDelta):
            wrote = True
            print(event.text, end="", flush=True)
        else:
            if wrote:
                print()
            wrote = False
            print(
                json.dumps(
                    {"tool_call": {"name": event.name, "arguments": json.loads(event.arguments_json)}},
                    ensure_ascii=False,
                ),
                flush=True,
            )
    raise RequestError("internal_error", "the answer ended without saying how")


def _print_stats(done: Done, load_s: float) -> None:
    from .stats import describe, memory_use

    if done.stats is not None:
        print(f"{describe(done.stats)}; finished: {done.finish_reason}", file=sys.stderr)
    print(f"loaded in {load_s:.2f} s; memory {memory_use()}", file=sys.stderr)
