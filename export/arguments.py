"""The arguments of `gemma-edge export`, declared without importing anything heavy."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_export_arguments(parser: argparse.ArgumentParser, *, out_is_positional: bool = False) -> None:
    """out_is_positional: Optimum's commands take the output folder as their last word."""
    parser.add_argument(
        "--model",
        metavar="PATH|HUB_ID",
        help="a checkpoint folder, `nano` (the bundled model) or a Hub id (default: the profile's)",
    )
    parser.add_argument(
        "--device", required=True, metavar="NAME", help="device profile; see `gemma-edge devices`"
    )
    parser.add_argument("--recipe", metavar="NAME", help="quantization recipe (default: the profile's)")
    parser.add_argument(
        "--context", type=_tokens, metavar="N", help="tokens of context (default: the profile's)"
    )
    parser.add_argument(
        "--prefill-weights",
        choices=("shared", "int8"),
        help="prompts are multiplied with the decoder's weights, or with an int8 copy of the lower layers', "
        "which is faster and larger (default: the recipe's, else the profile's)",
    )
    parser.add_argument("--no-audio", action="store_true", help="leave the model's audio encoder out")
    parser.add_argument(
        "--drafter",
        metavar="PATH|HUB_ID",
        help="the model's drafter (gemma4_assistant), as google/gemma-4-E2B-it-assistant: it guesses tokens",
    )
    default = "bundle folder (default: bundles/MODEL-DEVICE-RECIPE)"
    if out_is_positional:
        parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help=default)
    else:
        parser.add_argument("--out", type=Path, metavar="DIR", help=default)
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    add_hub_arguments(parser)


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Which of the Hub's revisions, and whether it may be asked."""
    parser.add_argument("--revision", metavar="REV", help="Hub branch, tag or commit")
    parser.add_argument("--offline", action="store_true", help="never ask the Hub; take what its cache has")


def _tokens(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of tokens")
    return count
