"""The arguments of `gemma-edge verify`, declared without importing anything heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import add_hub_arguments

MAX_TOKENS = 8192


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure a bundle against the checkpoint it was made from. "
        "Exit status: 0 ok, 1 not ok, 2 cannot be checked."
    )
    parser.add_argument("bundle", type=Path, help="folder made by `gemma-edge export`")
    parser.add_argument(
        "--model",
        metavar="PATH|HUB_ID",
        help="the checkpoint: a folder, `nano` or a Hub id (default: what the manifest names)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="*.jsonl: a conversation with `messages` a line; else plain text (default: texts of our own)",
    )
    parser.add_argument(
        "--max-tokens",
        type=_at_least_two,
        default=MAX_TOKENS,
        metavar="N",
        help=f"tokens of text to run, all conversations together (default: {MAX_TOKENS})",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: the CPUs there are")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    add_hub_arguments(parser)


def _at_least_two(text: str) -> int:
    count = int(text)
    if count < 2:
        raise argparse.ArgumentTypeError(f"{text} tokens; expected at least 2: the second one is predicted")
    return count
