"""Writes checkpoints of made-up weights in the Hub's layout, of any size, streamed to disk.

    python -m gemma_edge.export.synthetic --model e2b|e4b|CONFIG.json --layout bf16|qat-mobile OUT

They stand in for Google's in tests of format, speed and memory. Names and shapes are those of transformers'
own model for the config, and what the files of the Hub hold besides: keys and values of KV-shared layers,
which nothing reads, and the audio and vision towers. Weights are random, scaled to keep activations sane.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, cast

import numpy as np

from .synthetic_tokenizer import write_tokenizer

Layout = Literal["bf16", "qat-mobile"]

MODELS = ("e2b", "e4b")
SHARD_BYTES = 5 << 30
CHUNK_VALUES = 1 << 22  # values of a tensor made at a time by one thread
CHUNKS_IN_FLIGHT = 4
ITEM_BYTES = {"BF16": 2, "F32": 4, "U8": 1, "I8": 1}
# Largest magnitude of the levels, in standard deviations of the weights: about what trained ranges are.
RANGES = {2: 2.2, 4: 2.7, 8: 3.5}


@dataclass(frozen=True)
class Tensor:
    """One tensor to be written."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    bits: int | None = None  # packed levels of so many bits
    typical: float = 0.0  # of weight scales

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def known_config(model: str, layout: Layout) -> dict[str, Any]:
    """config.json of "e2b" or "e4b" as the Hub's checkpoint of this layout has it."""
    config = json.loads(_data(f"{model}.json"))
    if layout == "qat-mobile":
        config["quantization_config"] = json.loads(_data("qat-mobile.json"))[model]
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    return config


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: bool = True,
) -> None:
    """Write config.json, weights and, if asked, a tokenizer of the config's vocabulary size.

    config: with a `quantization_config` of method gemma, weights are packed as it says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shards = _shards(tensors_of(config), shard_bytes)
    names = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
        _write_shard(folder / name, shard, (seed, number))
    if len(shards) > 1:
        weight_map = {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = sum(tensor.size_bytes for shard in shards for tensor in shard)
        index = dict(metadata=dict(total_size=total), weight_map=weight_map)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    if tokenizer:
        write_tokenizer(folder, config.get("text_config", config)["vocab_size"])


def tensors_of(config: dict[str, Any]) -> list[Tensor]:
    """Every tensor that the checkpoint of `config` has, sorted by name."""
    import torch
    from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

    fields = {name: value for name, value in config.items() if name != "quantization_config"}
    quantization = config.get("quantization_config")
    with torch.device("meta"):
        model: Any
        if config["model_type"] == "gemma4":
            model = Gemma4ForConditionalGeneration(Gemma4Config(**fields))
        else:
            model = Gemma4ForCausalLM(Gemma4TextConfig(**fields))
        if quantization:
            _quantize_modules(model, quantization)
    text = model.config.get_text_config()
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "num_bits")}
    state = model.state_dict()
    if text.tie_word_embeddings:
        del state["lm_head.weight"]
    types = {torch.uint8: "U8", torch.int8: "I8"}
    full = "F32" if quantization else "BF16"
    found = [
        Tensor(
            name,
            _dtype(name, types.get(tensor.dtype), full),
            _scale_shape(name, tuple(tensor.shape), text),
            *_packing(name, packed.get(name.rpartition(".")[0])),
        )
        for name, tensor in state.items()
    ]
    return sorted((*found, *_dead(found, text, bool(quantization))), key=lambda tensor: tensor.name)


def _quantize_modules(model: Any, quantization: dict[str, Any]) -> None:
    from transformers import GemmaQuantizationConfig
    from transformers.integrations.gemma_quant import replace_with_quant_layers

    fields = {name: value for name, value in quantization.items() if name != "quant_method"}
    replace_with_quant_layers(
        model, GemmaQuantizationConfig(**fields), quantization.get("modules_to_not_convert")
    )


def _dtype(name: str, packed: str | None, full: str) -> str:
    """Scales are float32; everything that is not packed is bfloat16."""
    if packed is not None:
        return packed
    return full if name.endswith("_scale") else "BF16"


def _packing(name: str, module: Any) -> tuple[int | None, float]:
    """Bits of packed levels; the size of weight scales that gives the weights their deviation."""
    if module is None:
        return None, 0.0
    if name.endswith((".weight_scale", ".embedding_scale")):
        width = getattr(module, "in_features", None) or module.embedding_dim
        return None, _deviation(name, width) * RANGES[module.num_bits] / (1 << (module.num_bits - 1))
    return (module.num_bits if name.endswith((".weight", ".embedding_quantized")) else None), 0.0


def _scale_shape(name: str, shape: tuple[int, ...], text: Any) -> tuple[int, ...]:
    """The per-layer table has a scale for each row and layer, where transformers declares one a row."""
    if name.endswith("embed_tokens_per_layer.embedding_scale"):
        return (shape[0], text.num_hidden_layers)
    return shape


def _dead(found: list[Tensor], text: Any, quantized: bool) -> Iterator[Tensor]:
    """What the Hub's files hold and transformers' model does not: keys and values of KV-shared layers, scales
    of a quantized cache.
    """
    by_name = {tensor.name: tensor for tensor in found}
    prefix = next(name for name in by_name if name.endswith("layers.0.layer_scalar")).removesuffix(
        "0.layer_scalar"
    )
    first = text.num_hidden_layers - text.num_kv_shared_layers
    for index in range(text.num_hidden_layers):
        layer = f"{prefix}{index}.self_attn."
        if index >= first:
            same = [i for i in range(first) if text.layer_types[i] == text.layer_types[index]]
            source = f"{prefix}{same[-1]}.self_attn."
            for name, tensor in by_name.items():
                if name.startswith((f"{source}k_", f"{source}v_")):
                    yield replace(tensor, name=layer + name.removeprefix(source))
        if quantized:
            yield Tensor(f"{layer}k_cache_scale", "F32", ())
            yield Tensor(f"{layer}v_cache_scale", "F32", ())


def _shards(tensors: list[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Tensors in order, a new shard where the next one would not fit."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.size_bytes for other in shards[-1]) + tensor.size_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _write_shard(path: Path, tensors: list[Tensor], seed: tuple[int, int]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size_bytes
        header[tensor.name] = dict(dtype=tensor.dtype, shape=tensor.shape, data_offsets=[offset, end])
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(2) as pool:
        file.write(struct.pack("<Q", len(text)) + text)
        waiting: list[Any] = []
        for number, (tensor, first, count) in enumerate(_chunks(tensors)):
            waiting.append(pool.submit(_values, tensor, first, count, (*seed, number)))
            if len(waiting) == CHUNKS_IN_FLIGHT:
                file.write(waiting.pop(0).result())
        for chunk in waiting:
            file.write(chunk.result())


def _chunks(tensors: list[Tensor]) -> Iterator[tuple[Tensor, int, int]]:
    for tensor in tensors:
        total = math.prod(tensor.shape)
        for first in range(0, total, CHUNK_VALUES):
            yield tensor, first, min(CHUNK_VALUES, total - first)


def _values(tensor: Tensor, first: int, count: int, seed: tuple[int, ...]) -> bytes:
    """The bytes of `count` values of a tensor from `first` on."""
    random = np.random.Generator(np.random.SFC64(seed))
    if tensor.bits:
        table = _level_bytes(tensor.bits)
        return table[random.integers(0, len(table), count, np.uint16)].tobytes()
    if tensor.dtype == "F32":
        return _scales(tensor, count, random).tobytes()
    values = random.standard_normal(count, np.float32)
    mean, deviation = _moments(tensor)
    values *= np.float32(deviation)
    values += np.float32(mean)
    if tensor.name.endswith("layer_scalar"):
        np.clip(values, 0.3, 1.0, out=values)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _moments(tensor: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a bfloat16 tensor."""
    name = tensor.name
    if name.endswith(("_min", "_max")):  # of clipped linears
        return (-16.0 if name.endswith("_min") else 16.0), 0.0
    if name.endswith("layer_scalar"):
        return 0.7, 0.15
    if len(tensor.shape) == 1:
        return (0.0, 0.02) if name.endswith((".bias", "per_dim_scale")) else (1.0, 0.1)
    return 0.0, _deviation(name, tensor.shape[-1] if len(tensor.shape) == 2 else math.prod(tensor.shape[1:]))


def _deviation(name: str, width: int) -> float:
    """Of a matrix: its product with numbers of deviation 1 has deviation 1, and logits have 3."""
    if name.endswith("position_embedding_table"):
        return 0.02
    if "embed_tokens_per_layer" in name:
        return 1 / 16  # rows are multiplied by the root of their 256 values per layer
    return (3.0 if "embed_tokens" in name or name.startswith("lm_head") else 1.0) / math.sqrt(width)


def _scales(tensor: Tensor, count: int, random: np.random.Generator) -> np.ndarray:
    """float32 scales: of activations and caches one number, of weights one for each row or block."""
    if not tensor.typical:
        return np.full(count, 0.05 if "cache" in tensor.name else 0.25, np.float32)
    spread = np.exp(np.float32(0.2) * random.standard_normal(count, np.float32))
    return cast(np.ndarray, np.float32(tensor.typical) * spread)


def _level_bytes(bits: int) -> np.ndarray:
    """Every byte of packed levels, as often as normally distributed weights would have it: (2^16,) uint8.

    8 bits are int8; 2 and 4 bits are unsigned with 2^(bits-1) for zero, the first value in the lowest bits.
    """
    zero = 1 << (bits - 1)
    normal = NormalDist(0, zero / RANGES[bits])
    edges = [0.0, *(normal.cdf(level + 0.5) for level in range(-zero, zero - 1)), 1.0]
    each = np.diff(edges)  # share of each level
    shares = each
    for _ in range(8 // bits - 1):
        shares = (each[:, None] * shares[None, :]).reshape(-1)  # the last factor is in the lowest bits
    counts = np.floor(np.cumsum(shares) * (1 << 16) + 0.5).astype(np.int64)
    table = np.repeat(np.arange(256), np.diff(counts, prepend=0)).astype(np.uint8)
    return table if bits < 8 else table ^ np.uint8(128)


def _data(name: str) -> str:
    return (resources.files(__package__ or "gemma_edge.export") / "configs" / name).read_text(
        encoding="utf-8"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, metavar="e2b|e4b|CONFIG", help="a known size, or a config.json"
    )
    parser.add_argument("--layout", choices=("bf16", "qat-mobile"), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder, made if need be")
    args = parser.parse_args(arguments)
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out}: not empty")
    if args.model in MODELS:
        config = known_config(args.model, args.layout)
    else:
        config = json.loads(Path(args.model).read_text(encoding="utf-8"))
        if (args.layout == "qat-mobile") != ("quantization_config" in config):
            parser.error(
                f"{args.model}: layout qat-mobile goes with a quantization_config, layout bf16 goes without"
            )
    write_checkpoint(args.out, config, seed=args.seed)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {args.model}, {args.layout}, {size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
