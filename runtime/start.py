"""What the command line says of a start, for `ask`, `serve` and `prepare`: packed weights, their memory."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, get_args

from .bundle import Bundle, PrepareWhen, Residency, open_bundle
from .errors import BundleError, GemmaEdgeError

T = TypeVar("T")

log = logging.getLogger(__name__)

OFF = "off"
MIB = 2**20


def add_start_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare them, for a parser or a group of arguments."""
    parser.add_argument(
        "--prepare",
        choices=(*get_args(PrepareWhen), OFF),
        help="packed weights, which `gemma-edge prepare` writes: use them if they are there, make them at "
        "the first start, or leave them alone (default: the bundle's)",
    )
    parser.add_argument(
        "--prepared", metavar="DIR", type=Path, help="where they are (default: BUNDLE/prepared)"
    )
    parser.add_argument(
        "--residency",
        choices=get_args(Residency),
        help="packed weights are paged in when they are needed, read in at the start, or locked in memory "
        "(default: the bundle's)",
    )


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `prepare`."""
    parser.add_argument("bundle", type=Path, help="folder made by `gemma-edge export`")
    parser.add_argument(
        "--prepared", metavar="DIR", type=Path, help="where to write (default: BUNDLE/prepared)"
    )
    parser.add_argument("--force", action="store_true", help="pack again though what is there fits")
    parser.add_argument(
        "--check", action="store_true", help="read all of it and say whether it fits; status 1 if not"
    )


def run_prepare(args: argparse.Namespace) -> int:
    """Pack the weights for this CPU, unless that was done. Raises GemmaEdgeError."""
    from .aside import terminated_as_interrupted
    from .prepared import default_folder, make, misfit

    bundle = open_bundle(args.bundle)
    folder = args.prepared or default_folder(bundle)
    why_not = misfit(bundle, folder, verify_hashes=args.check)
    if why_not is None and not args.force:
        print(f"{folder}: fits this machine")
        return 0
    if args.check:
        raise GemmaEdgeError(f"{why_not}; run {_command(bundle)} --force")
    start = time.perf_counter()
    with terminated_as_interrupted():
        size_bytes = make(bundle, folder)
    print(f"{folder}: {size_bytes // MIB} MiB in {time.perf_counter() - start:.1f} s")
    return 0


def load_prepared(bundle: Bundle, args: argparse.Namespace, load: Callable[[Bundle], T]) -> T:
    """What `load` makes of the bundle, with packed weights if the arguments or its profile ask for them.

    They are made first if need be. Without them, for whatever reason, the bundle's own weights are loaded.
    """
    if getattr(args, "engine", None) == "genai":  # it reads the bundle's own
        return load(bundle)
    ready = _prepared_bundle(bundle, args)
    if ready.prepared is None:
        if args.residency not in (None, "map"):
            log.warning("--residency %s: needs packed weights; run %s", args.residency, _command(bundle))
        return load(bundle)
    from .residency import keep

    try:
        loaded = load(ready)
    except BundleError as cause:
        log.warning("%s: not usable (%s); run %s --force", ready.prepared, cause, _command(bundle))
        return load(bundle)
    keep(ready.prepared, args.residency or bundle.manifest.runtime.residency)
    return loaded


def _prepared_bundle(bundle: Bundle, args: argparse.Namespace) -> Bundle:
    when = args.prepare or bundle.manifest.runtime.prepare
    if when == OFF:
        return bundle
    from .prepared import default_folder, graphs, make, misfit

    folder = args.prepared or default_folder(bundle)
    wanted = when == "first-start" or args.prepared is not None or folder.exists()
    if not wanted or not graphs(bundle):
        return bundle
    why_not = misfit(bundle, folder)
    if why_not is not None and when == "first-start":
        print(f"{why_not}; packing weights for this CPU, once", file=sys.stderr, flush=True)
        try:
            make(bundle, folder)
        except GemmaEdgeError as cause:
            log.warning("%s; going on without packed weights", cause)
            return bundle
        why_not = misfit(bundle, folder)
    if why_not is not None:
        log.warning("%s; packed weights are not used: run %s", why_not, _command(bundle))
        return bundle
    return dataclasses.replace(bundle, prepared=folder)


def _command(bundle: Bundle) -> str:
    return f"`gemma-edge prepare {bundle.path}`"
