"""What the command line says of the engine, for `ask` and `serve`: prefix cache and guesses.

It also knows where a system turn ends in a prompt's ids, which the engine does not.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drafts import MOST_DRAFT
from .errors import ConfigError
from .start import OFF

if TYPE_CHECKING:
    from .bundle import Bundle
    from .chat import ChatTemplate
    from .engine import Engine
    from .genai_engine import GenaiEngine
    from .tokenizer import Tokenizer

log = logging.getLogger(__name__)

MIB = 2**20
AUTO_DRAFT = 8
ENGINES = ("builtin", "genai")
TURN = "<|turn>"
SYSTEM = "system"


def add_engine_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare them, for a parser or a group of arguments."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="what runs the model: this project's engine, or onnxruntime-genai, which has no prefix cache "
        f"and makes no guesses (default: {ENGINES[0]})",
    )
    parser.add_argument(
        "--speculate",
        metavar="N|off|auto",
        type=_speculate,
        help=f"guess up to N tokens (at most {MOST_DRAFT}) and check them in one pass; as many as pay off "
        f"(default: auto, which is {AUTO_DRAFT})",
    )
    parser.add_argument(
        "--no-drafter",
        action="store_true",
        help="leave the bundle's drafter out of memory: look guesses up only",
    )
    parser.add_argument(
        "--prefix-cache",
        metavar="MIB",
        type=_mib,
        help="memory for caches of system prompts and conversations, so that they are not run again "
        "(default: a quarter of what the bundle's budget leaves, at most 128; 0: none)",
    )
    parser.add_argument(
        "--prefix-dir",
        metavar="DIR",
        type=Path,
        help="keep those of system prompts in this folder too, for the next start",
    )


def open_engine(
    bundle: Bundle, args: argparse.Namespace, tokenizer: Tokenizer, *, reuse: bool = True, hears: bool = False
) -> Engine | GenaiEngine:
    """The engine that the arguments (and `--threads`) ask for.

    reuse: False for a single request. hears: whether there may be sounds; genai loads other graphs then.
    """
    if args.engine == "genai":
        return _open_genai(bundle, args, hears)
    from .engine import Engine  # loads onnxruntime, which --help needs not wait for
    from .prefix import ReuseSettings, default_budget_bytes

    budget = args.prefix_cache if args.prefix_cache is not None else default_budget_bytes(bundle.manifest)
    settings = ReuseSettings(budget, args.prefix_dir, system_end(tokenizer))
    return Engine(
        bundle,
        threads=args.threads,
        reuse=settings if reuse or args.prefix_dir is not None else None,
        speculate=AUTO_DRAFT if args.speculate is None else args.speculate,
        drafter=not args.no_drafter,
    )


def _open_genai(bundle: Bundle, args: argparse.Namespace, hears: bool) -> GenaiEngine:
    """Raises ConfigError for what only the built-in engine does."""
    asked = {
        "--speculate": args.speculate,
        "--prefix-cache": args.prefix_cache,
        "--prefix-dir": args.prefix_dir,
        "--pin": getattr(args, "pin", None),
        "--prepare": args.prepare if args.prepare != OFF else None,
        "--prepared": args.prepared,
        "--residency": args.residency,
    }
    if refused := [option for option, value in asked.items() if value]:
        raise ConfigError(
            "--engine genai: has no prefix cache, no packed weights and makes no guesses; leave out "
            f"{', '.join(refused)}, or take --engine builtin"
        )
    from .genai_engine import GenaiEngine

    engine = GenaiEngine(bundle, threads=args.threads, hears=hears and bundle.manifest.audio is not None)
    log.info("onnxruntime-genai: no prefix cache, no guesses; a prompt runs when it is there whole")
    return engine


def pin(engine: Engine | GenaiEngine, tokenizer: Tokenizer, template: ChatTemplate, file: Path) -> None:
    """Run a system prompt now and keep it. `file`: its text, or JSON with "messages" and "tools".

    Raises ConfigError if the file cannot be read, RequestError if there is no room.
    """
    try:
        text = file.read_text(encoding="utf-8")
        data: Any = json.loads(text) if file.suffix == ".json" else [{"role": SYSTEM, "content": text}]
    except (OSError, ValueError) as cause:
        raise ConfigError(
            f"--pin {file}: expected a text, or JSON messages in a .json file ({cause})"
        ) from cause
    data = {"messages": data} if isinstance(data, list) else data
    if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
        raise ConfigError(f'--pin {file}: expected a list of messages, or an object with "messages"')
    ids = template.encode(tokenizer, data["messages"], data.get("tools") or [], add_generation_prompt=False)
    engine.remember(ids, file.stem)


def system_end(tokenizer: Tokenizer) -> Callable[[Sequence[int]], int | None]:
    """Finds where the turn after the system turn begins; None in a prompt that has no system turn."""
    begin = tokenizer.controls.get(TURN)

    def boundary(keys: Sequence[int]) -> int | None:
        turns = [at for at, key in enumerate(keys) if key == begin]
        if len(turns) < 2:
            return None
        role = tokenizer.decode(key for key in keys[turns[0] + 1 :][: len(SYSTEM)] if key >= 0)
        return turns[1] if role.startswith(SYSTEM) else None

    return boundary


def _speculate(given: str) -> int:
    if given in ("off", "auto"):
        return AUTO_DRAFT if given == "auto" else 0
    if given.isdecimal() and int(given) <= MOST_DRAFT:
        return int(given)
    raise argparse.ArgumentTypeError(f"expected off, auto or a number up to {MOST_DRAFT}, got {given!r}")


def _mib(given: str) -> int:
    """Bytes."""
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1 << 20:
        raise argparse.ArgumentTypeError(f"expected MiB, 0 or more, got {given!r}")
    return int(value * MIB)
