"""`gemma-edge verify`: opens bundle and checkpoint, checks that they belong together, prints the result."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from ...runtime.bundle import Bundle, open_bundle, sha256_file
from ...runtime.errors import ConfigError, GemmaEdgeError
from ..checkpoint import open_checkpoint
from ..geometry import TextModel, read_text_model
from ..source import find_checkpoint
from .report import Verification, as_json, table
from .tensors import SourceWeights
from .texts import load_texts
from .verify import verify

OK, NOT_OK, CANNOT_CHECK = 0, 1, 2


def run_verify(args: argparse.Namespace) -> int:
    """Verify as the command line says; see `arguments`. Returns the exit status."""
    try:
        found = _verify(args)
        if args.json is not None:
            _write_json(args.json, found)
    except GemmaEdgeError as error:
        print(f"gemma-edge: cannot be checked: {error}", file=sys.stderr)
        return CANNOT_CHECK
    print(table(found))
    return OK if found.passed else NOT_OK


def _verify(args: argparse.Namespace) -> Verification:
    bundle = open_bundle(args.bundle)
    manifest = bundle.manifest
    source = find_checkpoint(
        args.model or manifest.source.model,
        revision=args.revision or manifest.source.revision,
        offline=args.offline,
    )
    model = read_text_model(source.folder)
    _check_pair(bundle, model, source.folder)
    texts, tokenizer = load_texts(args.prompts, bundle, args.max_tokens)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    weights = SourceWeights(open_checkpoint(source.folder), model)
    style = dict(
        file=sys.stderr, dynamic_ncols=True, leave=False, bar_format="{elapsed} {desc}", disable=None
    )
    with tqdm(**style) as bar:

        def progress(part: str) -> None:
            bar.set_description_str(part, refresh=False)
            bar.update()

        return verify(
            bundle,
            weights,
            texts,
            tokenizer,
            model=source.asked,
            threads=args.threads,
            progress=progress,
        )


def _check_pair(bundle: Bundle, model: TextModel, checkpoint: Path) -> None:
    """Raises ConfigError if the bundle was made of another model."""
    if model.geometry != bundle.manifest.geometry:
        raise ConfigError(
            f"{bundle.path}: its model has another shape than {checkpoint}; it was made of "
            f"{bundle.manifest.source.model}: name that checkpoint with --model"
        )
    if sha256_file(checkpoint / "config.json") != bundle.manifest.source.config_sha256:
        raise ConfigError(
            f"{checkpoint / 'config.json'}: not the file that the bundle was made with "
            f"({bundle.manifest.source.model}); name that checkpoint with --model, or export again"
        )


def _write_json(path: Path, found: Verification) -> None:
    try:
        path.write_text(json.dumps(as_json(found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as cause:
        raise ConfigError(f"{path}: cannot be written ({cause.strerror}); choose another --json") from cause
