"""Makes a bundle: plan, trace, stream the weights, describe; written aside and renamed when whole.

A failed or interrupted export leaves nothing behind, and an existing bundle is replaced only when asked to.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from .. import __version__
from ..runtime import genai_files
from ..runtime.aside import written_aside
from ..runtime.bundle import (
    CUDA_DECODER,
    FORMAT_VERSION,
    MANIFEST,
    Audio,
    Drafter,
    FileEntry,
    Manifest,
    Part,
    Prefill,
    RuntimeSettings,
    Source,
    Tokens,
    sha256_file,
)
from ..runtime.errors import GemmaEdgeError
from ..runtime.profile import DeviceProfile
from . import genai
from .attach import attach
from .attach_prefill import attach_prefill
from .audio_geometry import AudioModel, parse_audio_model
from .audio_settings import describe_audio
from .cache_calibration import calibrate
from .checkpoint import Checkpoint, open_checkpoint
from .decode_step import write_decode_step
from .drafter import PreparedDrafter, prepare_drafter, write_drafter
from .fused import fused_layers
from .genai_audio import write_audio_variant
from .geometry import TextModel, read_config, read_text_model
from .parts import WORTH_BYTES, write_parts
from .pickers import write_pickers
from .plan import AUDIO_DATA, DECODER_DATA, EMBEDDINGS_DATA, PREFILL_DATA, Plan, inner_type
from .qat_plan import plan_for
from .recipes import Recipe
from .source import CheckpointSource, read_json
from .store import DataFile, Progress, StoredChannels, StoredWeight, store_channels, store_weights
from .token_table import write_token_table
from .trace import Traced, trace_audio, trace_cuda_decoder, trace_decoder, trace_embeddings, trace_prefill

log = logging.getLogger(__name__)

REQUIRED_FILES = ("config.json", "tokenizer.json")
OPTIONAL_FILES = ("tokenizer_config.json", "generation_config.json")
TEMPLATE = "chat_template.jinja"
VERSIONS_OF = ("torch", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "sentencepiece")


class ExportError(GemmaEdgeError):
    """The bundle cannot be written where or as asked."""


@dataclass(frozen=True)
class Job:
    """What to export."""

    source: CheckpointSource
    profile: DeviceProfile
    recipe: Recipe
    context: int | None  # None: the profile's, as far as the model goes
    out: Path
    force: bool = False
    audio: bool = True  # False leaves the audio encoder out
    drafter: CheckpointSource | None = None
    fused: bool = True  # on CUDA, products of one input are one where they can be
    parts_from_bytes: int = WORTH_BYTES  # of weights, from which on the decoder loads in parts on a CPU


@dataclass(frozen=True)
class Prepared:
    """A job that has been checked: nothing is written yet."""

    job: Job
    model: TextModel
    plan: Plan
    checkpoint: Checkpoint
    tokens: Tokens
    template: str  # the chat template
    ears: tuple[AudioModel, Audio] | None  # the audio encoder and its description; None: text only
    drafter: PreparedDrafter | None = None

    @property
    def weight_count(self) -> int:
        """Weights that will be read, for a progress bar."""
        drafter = () if self.drafter is None else self.drafter.weights
        shapes = [weight.shape for weight in (*self.plan.weights, *drafter)]
        shapes += [weight.shape for weight in self.plan.prefill]
        return sum(rows * width for rows, width in shapes)


def prepare(job: Job) -> Prepared:
    """Check everything that can be checked before the work: geometry, budget, checkpoint, destination."""
    model = read_text_model(job.source.folder)
    longest = model.geometry.max_position_embeddings
    context = min(job.profile.context, longest) if job.context is None else job.context
    if context > longest:
        raise ExportError(f"a context of {context} tokens: the model was made for at most {longest}")
    ears = _read_ears(job, model)
    drafter = None
    if job.drafter is not None:
        drafter = prepare_drafter(job.drafter, model, job.profile, job.recipe)
    checkpoint = open_checkpoint(job.source.folder)
    plan = plan_for(
        checkpoint,
        model,
        job.profile,
        job.recipe,
        context=context,
        audio=None if ears is None else ears[0],
        drafter_bytes=0 if drafter is None else drafter.resident_bytes,
    )
    for name in REQUIRED_FILES:
        if not (job.source.folder / name).is_file():
            raise ExportError(f"{job.source.folder / name}: no such file; the checkpoint is not complete")
    _check_destination(job.out, job.force)
    drafter_bytes = 0 if drafter is None else drafter.file_bytes
    _check_space(job.out, plan.file_bytes + drafter_bytes)
    folder = job.source.folder
    tokens, template = _read_tokens(folder), _read_template(folder)
    return Prepared(job, model, plan, checkpoint, tokens, template, ears, drafter)


def write_bundle(prepared: Prepared, progress: Progress = lambda name, weights: None) -> Manifest:
    """Write the bundle and return its manifest. progress: called with the tensor at hand and weights done."""
    job = prepared.job
    with written_aside(job.out, ExportError, lambda: _check_destination(job.out, job.force)) as folder:
        write_token_table(job.source.folder / "tokenizer.json", folder / "tokenizer.table")
        stored, channels = _write_graphs(prepared, folder, progress)
        drafter = None
        if prepared.drafter is not None:
            drafter = write_drafter(
                prepared.drafter, prepared.plan.caches, prepared.checkpoint, job.recipe, folder, progress
            )
        parts: tuple[Part, ...] = ()
        if job.profile.execution_provider == "cpu":
            parts = write_parts(folder, prepared.model, worth_bytes=job.parts_from_bytes)
        genai.write_text_graph(folder / "embeddings.onnx", folder / "decoder.onnx", folder / genai_files.TEXT)
        genai.write_genai_config(
            folder / genai_files.CONFIG, prepared.model, prepared.plan.caches, prepared.tokens
        )
        if prepared.ears is not None:
            write_audio_variant(folder, prepared.ears[1].tokens, prepared.tokens)
        _copy_files(prepared, folder)
        progress("hashing", 0)
        manifest = _manifest(prepared, stored, channels, drafter, parts, folder)
        _write_manifest(manifest, folder)
        if manifest.caches.dtype == "int8":
            progress("calibrating caches", 0)
            changed = {name: _entry(folder / name) for name in calibrate(folder)}
            manifest = msgspec.structs.replace(manifest, files=manifest.files | changed)
            _write_manifest(manifest, folder)
    return manifest


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, sha256_file(path))


def _write_graphs(
    prepared: Prepared, folder: Path, progress: Progress
) -> tuple[dict[str, StoredWeight], dict[str, StoredChannels]]:
    """What is stored of each weight, and of those of the prefill graph."""
    model, plan, checkpoint = prepared.model, prepared.plan, prepared.checkpoint
    progress("tracing", 0)
    inner = inner_type(prepared.job.profile)
    graphs: dict[str, Traced] = {
        "embeddings.onnx": trace_embeddings(model),
        "decoder.onnx": trace_decoder(model, plan.caches, inner, prepared.drafter is not None),
    }
    if prepared.job.profile.execution_provider == "cuda":
        together = fused_layers(plan.weights, prepared.job.recipe) if prepared.job.fused else frozenset()
        graphs[CUDA_DECODER] = trace_cuda_decoder(model, plan.caches, inner, together)
        write_pickers(folder, model.geometry.vocab_size)
    with (
        DataFile(folder / DECODER_DATA) as decoder_data,
        DataFile(folder / EMBEDDINGS_DATA) as embeddings_data,
    ):
        files = {DECODER_DATA: decoder_data, EMBEDDINGS_DATA: embeddings_data}
        own = [weight for weight in plan.weights if weight.file in files]
        stored = store_weights(files, checkpoint, own, progress)
        for name, traced in graphs.items():
            graph = attach(
                traced, stored, checkpoint, decoder_data, head=plan.head, recipe=prepared.job.recipe
            )
            ir.save(graph, folder / name)
            if name == CUDA_DECODER:
                reason = write_decode_step(folder, model, graph, checkpoint, plan.head)
                if reason is not None:
                    log.warning("decode steps will run on ONNX Runtime's kernels, not on our own: %s", reason)
        channels = _write_prefill_graph(prepared, folder, decoder_data, progress) if plan.prefill else {}
    if prepared.ears is not None:
        stored |= _write_audio_graphs(prepared, prepared.ears[0], folder, progress)
    return stored, channels


def _write_prefill_graph(
    prepared: Prepared, folder: Path, constants: DataFile, progress: Progress
) -> dict[str, StoredChannels]:
    """Rotary tables are the decoder's."""
    plan = prepared.plan
    progress("tracing", 0)
    traced = trace_prefill(prepared.model, plan.caches)
    with DataFile(folder / PREFILL_DATA) as data:
        channels = store_channels(data, prepared.checkpoint, plan.prefill, progress)
        graph = attach_prefill(traced, channels, prepared.checkpoint, constants, prepared.job.recipe)
        ir.save(graph, folder / "prefill.onnx")
    return channels


def _write_audio_graphs(
    prepared: Prepared, model: AudioModel, folder: Path, progress: Progress
) -> dict[str, StoredWeight]:
    """Two graphs, whole clip and stream, on one data file."""
    progress("tracing", 0)
    graphs = {
        "audio_encoder.onnx": trace_audio(model, False),
        "audio_encoder_stream.onnx": trace_audio(model, True),
    }
    with DataFile(folder / AUDIO_DATA) as data:
        own = [weight for weight in prepared.plan.weights if weight.file == AUDIO_DATA]
        stored = store_weights({AUDIO_DATA: data}, prepared.checkpoint, own, progress)
        for name, traced in graphs.items():
            graph = attach(
                traced, stored, prepared.checkpoint, data, head=prepared.plan.head, recipe=prepared.job.recipe
            )
            ir.save(graph, folder / name)
    return stored


def _manifest(
    prepared: Prepared,
    stored: dict[str, StoredWeight],
    channels: dict[str, StoredChannels],
    drafter: Drafter | None,
    parts: tuple[Part, ...],
    folder: Path,
) -> Manifest:
    job, profile = prepared.job, prepared.job.profile
    return Manifest(
        format_version=FORMAT_VERSION,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        source=Source(
            model=job.source.asked,
            revision=job.source.revision,
            config_sha256=sha256_file(job.source.folder / "config.json"),
            dtype=prepared.model.dtype,
        ),
        device=profile.name,
        recipe=job.recipe.name,
        geometry=prepared.model.geometry,
        caches=prepared.plan.caches,
        tokens=prepared.tokens,
        runtime=RuntimeSettings(
            execution_provider=profile.execution_provider,
            threads=profile.cpu.threads,
            prefill_chunk=profile.prefill_chunk,
            memory_budget_mib=profile.memory.budget_mib,
            prepare=profile.start.prepare,
            residency=profile.start.residency,
        ),
        quantization=tuple(weight.report for weight in stored.values() if weight.report is not None),
        memory=prepared.plan.memory,
        files={
            path.name: FileEntry(path.stat().st_size, sha256_file(path)) for path in sorted(folder.iterdir())
        },
        versions={"gemma-edge": __version__}
        | {package: importlib.metadata.version(package) for package in VERSIONS_OF},
        audio=None if prepared.ears is None else prepared.ears[1],
        drafter=drafter,
        prefill=_describe_prefill(channels, folder) if channels else None,
        decoder_parts=parts,
    )


def _describe_prefill(channels: dict[str, StoredChannels], folder: Path) -> Prefill:
    return Prefill(
        weights_bytes=(folder / PREFILL_DATA).stat().st_size,
        quantization=tuple(weight.report for weight in channels.values()),
    )


def _read_ears(job: Job, model: TextModel) -> tuple[AudioModel, Audio] | None:
    if not job.audio:
        return None
    folder = job.source.folder
    config = read_config(folder)
    shape = model.geometry
    audio = parse_audio_model(config, str(folder / "config.json"), text_hidden_size=shape.hidden_size)
    if audio is None:
        return None
    return audio, describe_audio(audio, config, folder, vocab_size=shape.vocab_size)


def _read_tokens(folder: Path) -> Tokens:
    """Token ids from generation_config.json, else from config.json."""
    config = read_json(folder / "config.json")
    found: dict[str, Any] = {}
    for source in (config.get("text_config") or {}, config, read_json(folder / "generation_config.json")):
        found |= {name: value for name, value in source.items() if value is not None}
    if "eos_token_id" not in found or "bos_token_id" not in found:
        raise ExportError(
            f"{folder}: neither generation_config.json nor config.json says bos_token_id and eos_token_id"
        )
    eos = found["eos_token_id"]
    return Tokens(
        bos=found["bos_token_id"],
        pad=found.get("pad_token_id", 0),
        eos=tuple(eos) if isinstance(eos, list) else (eos,),
    )


def _read_template(folder: Path) -> str:
    """The chat template: a file of its own, or part of the tokenizer's settings."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if not isinstance(template, str):
        raise ExportError(f"{folder}: no {TEMPLATE}; a bundle needs the checkpoint's chat template")
    return template


def _copy_files(prepared: Prepared, folder: Path) -> None:
    source, tokens = prepared.job.source.folder, prepared.tokens
    for name in (*REQUIRED_FILES, *OPTIONAL_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    (folder / TEMPLATE).write_text(prepared.template, encoding="utf-8")
    if not (folder / "generation_config.json").is_file():
        data = dict(bos_token_id=tokens.bos, pad_token_id=tokens.pad, eos_token_id=list(tokens.eos))
        (folder / "generation_config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _check_destination(out: Path, force: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise ExportError(f"{out}: exists and is not a bundle, so it is not replaced; choose another --out")
    if not force:
        raise ExportError(f"{out}: a bundle is already there; --force replaces it, --out writes elsewhere")


def _check_space(out: Path, needed_bytes: int) -> None:
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise ExportError(
            f"{out}: the bundle needs {needed_bytes >> 20} MiB, the disk has {free_bytes >> 20} MiB left; "
            "choose another --out"
        )
