"""What a bundle is: the manifest's schema and the check that a folder holds a whole, undamaged bundle.

`export` writes these structs, `runtime` reads them; docs/bundle.md describes them for people. Knows
nothing of ONNX Runtime.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from .errors import BundleError
from .strict import convert

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# Outputs `read.{index}.{key|value}.{n}`: an int8 cache that an operator reads, and wants to write as well.
READ = "read."
# What the parts of a decoder hand on, (1, kept, width): three to the readers of caches, one to the head.
LOWER_HIDDEN, LOWER_NORMED = "lower_hidden_states", "lower_normed_states"
UPPER_INPUTS, HIDDEN = "upper_per_layer_inputs", "hidden_states"
# Only in bundles for CUDA: the decoder as our engine runs it there, on the same weights; what picks tokens.
DRAFTER = "drafter.onnx"
CUDA_DECODER = "decoder_cuda.onnx"
GREEDY = "greedy.onnx"
TOP = "top.onnx"
DECODE_STEP = "decode_step.json"  # what our own kernels need to know of decoder_cuda.onnx
DECODE_STEP_VECTORS = "decode_step.npz"

LayerType = Literal["sliding_attention", "full_attention"]
KvDtype = Literal["float32", "float16", "int8"]
PrefillWeights = Literal["shared", "int8"]  # the decoder's, or a copy for integer products
PrepareWhen = Literal["by-hand", "first-start"]
Residency = Literal["map", "prefault", "lock"]


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything in the manifest."""


class Source(Struct, frozen=True):
    """Where the weights came from."""

    model: str  # folder name or Hub id, as asked for
    revision: str | None  # Hub commit, when there is one
    config_sha256: str
    dtype: str  # of the checkpoint's tensors: "bfloat16", ...


class Geometry(Struct, frozen=True):
    """The shape of the text model, from config.json alone, under its own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int
    sliding_window: int
    layer_types: tuple[LayerType, ...]
    num_kv_shared_layers: int
    hidden_size_per_layer_input: int
    vocab_size_per_layer_input: int
    final_logit_softcapping: float | None
    max_position_embeddings: int


class LayerCache(Struct, frozen=True):
    """The key/value cache of one layer that is not KV-shared: 2 tensors (1, kv_heads, capacity, head_dim)."""

    index: int  # number in the graph's `past_key_values.{index}.key`
    layer_type: LayerType
    kv_heads: int
    capacity: int  # tokens: the context, or sliding_window + slack
    head_dim: int


class Caches(Struct, frozen=True):
    """All caches of one sequence."""

    context: int  # tokens the full-attention layers can hold
    dtype: KvDtype
    layers: tuple[LayerCache, ...]
    size_bytes: int


class Tokens(Struct, frozen=True):
    """Token ids that the runtime must know, from the checkpoint's own files."""

    bos: int
    pad: int
    eos: tuple[int, ...]  # generation stops on any of these


class RuntimeSettings(Struct, frozen=True):
    """What the device profile fixed."""

    execution_provider: Literal["cpu", "cuda"]
    threads: int
    prefill_chunk: int  # tokens
    memory_budget_mib: int
    prepare: PrepareWhen = "by-hand"  # packed weights, written once by the device (docs/performance.md)
    residency: Residency = "map"  # of packed weights that are mapped


class Quantized(Struct, frozen=True):
    """How one tensor was stored, and what that cost."""

    tensor: str
    bits: int
    block_size: int
    method: str
    relative_error: float  # |W - Wq|_F / |W|_F


class Part(Struct, frozen=True):
    """One of the graphs that do together what decoder.onnx does."""

    file: str
    weights_bytes: int  # that it multiplies with, in the data files of the decoder


class Prefill(Struct, frozen=True):
    """The prefill graph: the lower layers once more, for prompts, with weights of one scale an output."""

    weights_bytes: int  # its data file: mapped, of which the system may drop pages
    quantization: tuple[Quantized, ...]


class MelSettings(Struct, frozen=True):
    """How samples become log-mel frames: the checkpoint's feature extractor, with lengths in samples."""

    sampling_rate: int  # Hz
    bins: int
    frame_length: int  # samples
    hop_length: int  # samples
    fft_length: int  # samples, frames are padded to it
    min_frequency: float  # Hz
    max_frequency: float  # Hz
    mel_floor: float  # added before the logarithm
    preemphasis: float
    preemphasis_htk_flavor: bool
    input_scale_factor: float
    per_bin_mean: tuple[float, ...] | None
    per_bin_stddev: tuple[float, ...] | None


class StateTensor(Struct, frozen=True):
    """One tensor that a chunk of streamed audio hands to the next: zeros before the first."""

    name: str  # `past.{name}` is an input of the streaming graph, `present.{name}` the output
    shape: tuple[int, ...]
    dtype: Literal["float32", "int64"]


class AudioTokens(Struct, frozen=True):
    """Token ids around and in place of soft tokens."""

    placeholder: int  # one for each soft token
    begin: int
    end: int


class Audio(Struct, frozen=True):
    """The audio encoder: log-mel frames to soft tokens, which go in place of their placeholders."""

    hidden_size: int  # of a soft token; the text model's
    frames_per_token: int  # log-mel frames
    tokens_per_s: float  # soft tokens of a second of sound
    max_tokens: int  # of a clip, as the checkpoint's processor caps it
    chunk_tokens: int  # of one call of the streaming graph, by default; any number is right
    call_tokens: int  # of one call at most: bounds the memory that a call takes
    mel: MelSettings
    tokens: AudioTokens
    state: tuple[StateTensor, ...]  # of the streaming graph


class Memory(Struct, frozen=True):
    """Predicted memory of a running engine, in bytes."""

    weights_bytes: int  # held in RAM: everything but the embedding tables, the prefill graph's included
    mapped_bytes: int  # embedding tables, mapped from disk and evictable
    kv_bytes: int
    overhead_bytes: int  # interpreter, libraries, activations of one prefill chunk
    read_per_token_bytes: int  # weights read for one decoded token
    audio_bytes: int = 0  # of the audio encoder, held while it is open
    drafter_bytes: int = 0  # of the drafter's weights


class Drafter(Struct, frozen=True):
    """A small model that guesses what the model says next, over the model's own caches."""

    model: str  # as it was asked for
    revision: str | None  # Hub commit, when there is one
    reads: tuple[int, ...]  # numbers of the caches that it attends to
    scored: int  # tokens that its head scores: the vocabulary, or those near the best centroids
    weights_bytes: int
    quantization: tuple[Quantized, ...]


class FileEntry(Struct, frozen=True):
    """One file of the bundle."""

    size_bytes: int
    sha256: str


class Manifest(Struct, frozen=True):
    """The bundle's table of contents."""

    format_version: int
    created: str  # ISO 8601, UTC
    source: Source
    device: str  # profile name
    recipe: str
    geometry: Geometry
    caches: Caches
    tokens: Tokens
    runtime: RuntimeSettings
    quantization: tuple[Quantized, ...]
    memory: Memory
    files: dict[str, FileEntry]
    versions: dict[str, str]  # package -> version that made the bundle
    audio: Audio | None = None  # None: the model has no ears
    drafter: Drafter | None = None  # None: it was exported without one
    prefill: Prefill | None = None  # None: prompts run on the decoder graph
    decoder_parts: tuple[Part, ...] = ()  # in the order in which they run; none: decoder.onnx runs


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest
    prepared: Path | None = None  # folder of graphs that take the place of the bundle's own (`prepared`)

    @property
    def decoder(self) -> Path:
        return self._graph("decoder.onnx")

    @property
    def decoder_graphs(self) -> list[Path]:
        """What runs on a CPU, one after the other: the decoder's parts, or the decoder itself."""
        parts = self.manifest.decoder_parts
        return [self._graph(part.file) for part in parts] if parts else [self.decoder]

    @property
    def cuda_decoder(self) -> Path:
        return self.path / CUDA_DECODER

    @property
    def embeddings(self) -> Path:
        return self.path / "embeddings.onnx"

    @property
    def prefill(self) -> Path:
        """Only if the manifest describes it."""
        return self._graph("prefill.onnx")

    def without_prefill(self) -> Bundle:
        """The same bundle, its prefill graph left alone: the decoder graph runs the prompts too."""
        return replace(self, manifest=msgspec.structs.replace(self.manifest, prefill=None))

    @property
    def drafter(self) -> Path:
        return self.path / DRAFTER

    @property
    def audio_encoder(self) -> Path:
        """A whole clip at once."""
        return self.path / "audio_encoder.onnx"

    @property
    def audio_encoder_stream(self) -> Path:
        """Chunk by chunk; the same weights."""
        return self._graph("audio_encoder_stream.onnx")

    @property
    def name(self) -> str:
        """The name under which the model is served."""
        return self.path.resolve().name

    def _graph(self, name: str) -> Path:
        own = self.path / name
        if self.prepared is None:
            return own
        prepared = self.prepared / name
        return prepared if prepared.exists() else own


def open_bundle(path: Path | str, *, verify_hashes: bool = False) -> Bundle:
    """Open a bundle folder and check that every file is there with its size (and hash, if asked: reads all).

    Raises BundleError saying what is wrong and what to do.
    """
    folder = Path(path)
    manifest_path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder; make one with `gemma-edge export`")
    if not manifest_path.is_file():
        raise BundleError(f"{folder}: not a bundle (no {MANIFEST}); make one with `gemma-edge export`")
    try:
        data = msgspec.json.decode(manifest_path.read_bytes())
    except msgspec.DecodeError as cause:
        raise BundleError(f"{manifest_path}: not valid JSON ({cause}); export the bundle again") from cause
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{manifest_path}: format version {version}, this gemma-edge reads {FORMAT_VERSION}; "
            "export the bundle again or install the matching version"
        )
    manifest = convert(data, Manifest, str(manifest_path), BundleError)
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise BundleError(f"{folder}: {name} is missing; copy the bundle again or export it again")
        size = file.stat().st_size
        if size != entry.size_bytes:
            raise BundleError(f"{file}: {size} bytes, the manifest says {entry.size_bytes}; copy it again")
        if verify_hashes and sha256_file(file) != entry.sha256:
            raise BundleError(f"{file}: its SHA-256 differs from the manifest's; copy it again")
    return Bundle(folder, manifest)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
