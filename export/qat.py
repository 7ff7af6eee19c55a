"""What `quantization_config` of method gemma says: which weights a checkpoint holds quantized, and how.

Knows names and shapes, not bytes (`qat_rows` does). The rules are those of transformers' reader: modules are
named as in its model, patterns are searched for in that name, and the leftmost match decides.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..runtime.errors import ConfigError

METHOD = "gemma"
HELD_BITS = (2, 4, 8)
INPUT_SCALE, OUTPUT_SCALE = ".input_activation_scale", ".output_activation_scale"
TABLE_SUFFIXES = ("embedding_quantized", "embedding_scale")
LINEAR_SUFFIXES = ("weight", "weight_scale")
TEXT_PARTS = ("layers.", "embed_tokens", "per_layer_", "norm.")
HEAD_MODULE = "lm_head"


@dataclass(frozen=True)
class Held:
    """How the checkpoint holds one quantized weight: level * scale, levels -2^(bits-1) … 2^(bits-1) - 1."""

    bits: int
    columns: int  # scales in a row: each covers width / columns values
    data: str  # canonical names of the tensors
    scales: str

    def tensors(self, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """The tensors of a weight of this shape, with theirs."""
        rows, width = shape
        return {self.data: (rows, -(-width * self.bits // 8)), self.scales: (rows, self.columns)}

    @property
    def dtype(self) -> str:
        """Of the data, in safetensors' words."""
        return "I8" if self.bits == 8 else "U8"


@dataclass(frozen=True)
class Quantization:
    """The checkpoint's quantization_config."""

    default_bits: int
    has_tables: bool  # embedding tables are quantized too
    patterns: tuple[tuple[str, int], ...]  # of module names, with their bits
    skipped: tuple[str, ...]
    root: str  # what the text model's module names begin with

    def held(self, weight: str, *, is_table: bool, columns: int = 1) -> Held | None:
        """How `weight` (a canonical name) is held, None if as floats. columns: of scales, in a row."""
        if is_table and not self.has_tables:
            return None
        module = self._module(weight)
        if _is_skipped(module, self.skipped):
            return None
        data, scales = TABLE_SUFFIXES if is_table else LINEAR_SUFFIXES
        short = weight.removesuffix(".weight")
        return Held(
            bits=self._bits(module),
            columns=columns,
            data=f"{short}.{data}",
            scales=f"{short}.{scales}",
        )

    def _module(self, weight: str) -> str:
        """The name of a weight's module in transformers' model."""
        short = weight.removesuffix(".weight")
        if short == HEAD_MODULE:
            return short
        return (self.root if short.startswith(TEXT_PARTS) else "model.") + short

    def _bits(self, module: str) -> int:
        matcher = _matcher(tuple(pattern for pattern, _ in self.patterns))
        match = matcher.search(module) if self.patterns else None
        if match is None:
            return self.default_bits
        return next(
            bits for index, (_, bits) in enumerate(self.patterns) if match.group(f"g{index}") is not None
        )


def parse_quantization(
    config: Mapping[str, Any], where: str, *, is_multimodal: bool, tied_head: bool
) -> Quantization:
    """`config`: the object under quantization_config. Raises ConfigError for what cannot be imported."""
    if (method := config.get("quant_method")) != METHOD:
        raise ConfigError(
            f"{where}: quantization_config with quant_method {method!r} is not supported; expected "
            f"{METHOD!r} (a qat-mobile checkpoint) or none: export the bfloat16 checkpoint"
        )
    patterns: list[tuple[str, int]] = []
    default = _bits(config.get("num_bits", 4), "num_bits", where)
    for pattern, options in (config.get("module_quant_configs") or {}).items():
        if not isinstance(options, dict) or set(options) - {"num_bits"}:
            raise ConfigError(
                f"{where}: module_quant_configs[{pattern!r}] is {options!r}, expected {{num_bits: …}} alone"
            )
        patterns.append((pattern, _bits(options.get("num_bits", default), pattern, where)))
    root = "model.language_model." if is_multimodal else "model."
    skipped = config.get("modules_to_not_convert")
    if skipped is None:  # transformers leaves the head alone then, and what is tied to it
        skipped = [HEAD_MODULE, *([f"{root}embed_tokens"] if tied_head else [])]
    found = Quantization(
        default, bool(config.get("quantize_embeddings")), tuple(patterns), tuple(skipped), root
    )
    _check_patterns(found, where)
    if tied_head and (
        found.held("embed_tokens.weight", is_table=True) or found.held("lm_head.weight", is_table=False)
    ):
        raise ConfigError(
            f"{where}: tie_word_embeddings with a quantized token table or head is not supported; "
            "expected tie_word_embeddings: false"
        )
    return found


def _bits(value: Any, what: str, where: str) -> int:
    if value not in HELD_BITS:
        raise ConfigError(f"{where}: quantization_config: {what} has num_bits {value!r}, expected 2, 4 or 8")
    return value


def _check_patterns(found: Quantization, where: str) -> None:
    for pattern in (*(pattern for pattern, _ in found.patterns), *found.skipped):
        try:
            re.compile(pattern)
        except re.error as cause:
            raise ConfigError(
                f"{where}: quantization_config: {pattern!r} is no regular expression: {cause}"
            ) from cause


@functools.cache
def _matcher(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """All patterns as one: where two match at the same place, the earlier one wins."""
    return re.compile("|".join(f"(?P<g{index}>{pattern})" for index, pattern in enumerate(patterns)))


def _is_skipped(module: str, skipped: tuple[str, ...]) -> bool:
    """A key names a module by its beginning or as a pattern, up to a dot, or by its end."""
    return any(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(key) for key in skipped)
