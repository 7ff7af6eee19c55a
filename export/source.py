"""Finds the checkpoint that a name stands for: a folder, the bundled nano model, or one of the Hub's."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import ConfigError, GemmaEdgeError
from .checkpoint import weight_files

NANO = "nano"
# What an export reads; a repository may hold the same weights in other formats as well.
PATTERNS = ("*.json", "*.jinja", "*.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class SourceError(GemmaEdgeError):
    """The checkpoint cannot be had."""


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint on this machine."""

    folder: Path
    name: str  # short, for the bundle's folder
    asked: str  # as the user named it
    revision: str | None  # Hub commit


def find_checkpoint(
    asked: str, *, revision: str | None = None, offline: bool = False, tokenizer: bool = True
) -> CheckpointSource:
    """Raises SourceError saying why there is none and what to do. tokenizer: whether it must have one."""
    folder = nano_folder() if asked == NANO else Path(asked)
    if (folder / "config.json").is_file():
        return CheckpointSource(folder, folder.resolve().name, asked, None)
    if asked == NANO:
        raise SourceError(
            f"{folder}: the nano model is not there; it comes with the repository, not with the wheel"
        )
    if folder.is_dir():
        raise SourceError(f"{folder}: no config.json in it; expected a Hugging Face checkpoint folder")
    if not _HUB_ID.fullmatch(asked):
        raise SourceError(f"{asked}: neither a folder nor a Hub id such as google/gemma-4-E2B-it. {_INSTEAD}")
    return _from_hub(asked, revision, offline, tokenizer)


def nano_folder() -> Path:
    """models/nano beside the package's source."""
    return Path(__file__).resolve().parents[1] / "models" / NANO


def read_json(path: Path) -> dict[str, Any]:
    """The object in one of a checkpoint's files, empty if there is no such file. Raises ConfigError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as cause:
        raise ConfigError(f"{path}: not valid JSON ({cause}); download it again") from cause
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object; download it again")
    return data


_INSTEAD = "To try everything with the bundled model, pass `--model nano` (make: MODEL=nano)."


def _from_hub(hub_id: str, revision: str | None, offline: bool, tokenizer: bool) -> CheckpointSource:
    """From the Hub's cache; what is missing there is downloaded.

    A connection that breaks is taken up again where it broke. What an interrupted download left is kept, file
    by file: the next call asks for the rest.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder: Path | None = None
    with contextlib.suppress(LocalEntryNotFoundError):  # raised for a part of it, too
        folder = Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=PATTERNS, local_files_only=True)
        )
    whole = folder is not None and _is_whole(folder, tokenizer)
    if offline and not whole:
        raise SourceError(
            f"{hub_id} is not whole in the Hub cache, and --offline was given; without it, a download "
            f"goes on where it stopped. {_INSTEAD}"
        )
    if not whole:
        try:
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=PATTERNS))
        except (
            Exception
        ) as cause:  # the Hub client raises its own, the HTTP library's and the system's errors
            reason = (str(cause) or repr(cause)).strip().splitlines()[0]
            raise SourceError(
                f"{hub_id} is no folder, is not whole in the Hub cache, and cannot be "
                f"downloaded ({reason}). Whole files are kept: the same command goes on from there. "
                f"For a gated model, log in with `hf auth login`. {_INSTEAD}"
            ) from cause
    assert folder is not None
    return CheckpointSource(
        folder, hub_id.split("/")[1], hub_id, folder.name
    )  # the cache names folders by commit


def _is_whole(folder: Path, tokenizer: bool) -> bool:
    """Whether all files of a checkpoint are there: an interrupted download leaves some out."""
    names = ["config.json", "tokenizer.json"] if tokenizer else ["config.json"]
    expected = [*(folder / name for name in names), *weight_files(folder)]
    return all(path.is_file() for path in expected)
