"""Reads the audio encoder's shape from config.json's audio_config alone, and what its streaming state is.

Knows nothing of weights, devices or graphs. What the exporter cannot reproduce is refused by name.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from ..runtime.bundle import StateTensor
from ..runtime.errors import ConfigError
from .geometry import ACTIVATIONS

# Two convolutions of stride 2: the log-mel frames that become one soft token.
FRAMES_PER_TOKEN = 4
CALL_TOKENS = 48  # soft tokens that a runtime encodes in one call at most: bounds the memory of activations
# Beyond it exp() of the difference to any capped logit is zero in float32.
MASKED_MARGIN = 104.0

# transformers' defaults; the Hub's files name all of them.
DEFAULTS: dict[str, Any] = dict(
    hidden_size=1024,
    num_hidden_layers=12,
    num_attention_heads=8,
    hidden_act="silu",
    subsampling_conv_channels=[128, 32],
    conv_kernel_size=5,
    residual_weight=0.5,
    attention_chunk_size=12,
    attention_context_left=13,
    attention_context_right=0,
    attention_logit_cap=50.0,
    attention_invalid_logits_value=-1.0e9,
    use_clipped_linears=True,
    rms_norm_eps=1e-6,
    gradient_clipping=1e10,
    output_proj_dims=1536,
)
UNIFIED = "gemma4_unified_audio"  # the 12B's: raw samples go through one projection

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AudioModel:
    """Everything audio_config says that changes the computation."""

    hidden_size: int
    num_layers: int
    heads: int
    activation: str
    channels: tuple[int, int]  # of the two subsampling convolutions
    mel_bins: int
    conv_kernel_size: int  # of the causal depthwise convolution, in soft tokens
    residual_weight: float
    block: int  # queries that attend together; a matter of speed only
    left_tokens: int  # keys to the left of a token that it attends to
    relative_positions: tuple[int | None, ...]  # of distances left_tokens … 0; None: no bias
    logit_cap: float
    clipped: bool
    rms_norm_eps: float
    gradient_clipping: float
    output_width: int
    text_hidden_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def half_bins(self) -> int:
        """Frequency bins after the first convolution."""
        return (self.mel_bins + 1) // 2

    @property
    def quarter_bins(self) -> int:
        """Frequency bins after the second convolution."""
        return (self.half_bins + 1) // 2

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """What one chunk hands to the next: `past.{name}` in, `present.{name}` out, zeros first."""
        layers = [
            tensor
            for index in range(self.num_layers)
            for tensor in (
                StateTensor(f"{index}.key", (1, self.left_tokens, self.hidden_size), "float32"),
                StateTensor(f"{index}.value", (1, self.left_tokens, self.hidden_size), "float32"),
                StateTensor(f"{index}.conv", (1, self.conv_kernel_size - 1, self.hidden_size), "float32"),
            )
        ]
        return (
            StateTensor("tokens", (1,), "int64"),  # soft tokens so far
            StateTensor("frames", (1, 1, self.mel_bins), "float32"),  # the last log-mel frame
            StateTensor("subsampled", (1, self.channels[0], 1, self.half_bins), "float32"),
            *layers,
        )


def parse_audio_model(config: dict[str, Any], where: str, *, text_hidden_size: int) -> AudioModel | None:
    """`config`: the content of a config.json. None if the model has no audio encoder. Raises ConfigError."""
    audio = config.get("audio_config")
    if audio is None:
        return None
    if not isinstance(audio, dict):
        raise ConfigError(f"{where}: audio_config is {audio!r}, expected an object or null")
    where = f"{where}: audio_config"
    if audio.get("model_type") == UNIFIED:
        log.warning("%s: model_type %s has no encoder to export: the bundle takes text only", where, UNIFIED)
        return None
    if (model_type := audio.get("model_type", "gemma4_audio")) != "gemma4_audio":
        raise ConfigError(f"{where}: model_type {model_type!r} is not supported, expected gemma4_audio")
    reader = _Reader(audio, where)
    if (activation := reader.value("hidden_act")) not in ACTIVATIONS:
        reader.refuse("hidden_act", f"one of {', '.join(ACTIVATIONS)}")
    hidden, heads = reader.integer("hidden_size", least=2), reader.integer("num_attention_heads")
    if hidden % heads or hidden % 2:
        reader.refuse("hidden_size", f"an even multiple of num_attention_heads ({heads})")
    chunk, left = reader.integer("attention_chunk_size"), reader.integer("attention_context_left", least=3)
    right, cap = _right_context(reader), reader.number("attention_logit_cap")
    if cap <= 0:
        reader.refuse("attention_logit_cap", "a number above 0")
    if reader.number("attention_invalid_logits_value") > -cap - MASKED_MARGIN:
        reader.refuse("attention_invalid_logits_value", f"a number under {-cap - MASKED_MARGIN}")
    channels = _channels(reader)
    return AudioModel(
        hidden_size=hidden,
        num_layers=reader.integer("num_hidden_layers"),
        heads=heads,
        activation=activation,
        channels=channels,
        # The projection behind the convolutions takes channels[0] // 4 bins: a quarter of the log-mel's.
        mel_bins=channels[0] // 4 * 4,
        conv_kernel_size=reader.integer("conv_kernel_size", least=2),
        residual_weight=reader.number("residual_weight"),
        block=chunk,
        left_tokens=left - 2,
        relative_positions=_relative_positions(chunk=chunk, left=left, right=right),
        logit_cap=cap,
        clipped=bool(reader.value("use_clipped_linears")),
        rms_norm_eps=reader.number("rms_norm_eps"),
        gradient_clipping=reader.number("gradient_clipping"),
        output_width=reader.integer("output_proj_dims"),
        text_hidden_size=text_hidden_size,
    )


class _Reader:
    """Reads fields of audio_config, naming file and field when one is wrong."""

    def __init__(self, audio: dict[str, Any], where: str) -> None:
        self._audio = audio
        self._where = where

    def value(self, key: str) -> Any:
        value = self._audio.get(key)
        return DEFAULTS[key] if value is None else value

    def integer(self, key: str, *, least: int = 1) -> int:
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.refuse(key, f"an integer of at least {least}")
        return value

    def number(self, key: str) -> float:
        value = self.value(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            self.refuse(key, "a number")
        return float(value)

    def refuse(self, key: str, expected: str) -> None:
        raise ConfigError(f"{self._where}: {key} is {self.value(key)!r}, expected {expected}")


def _right_context(reader: _Reader) -> int:
    """The attention mask admits keys under `right` tokens ahead: 0 and 1 both mean none."""
    right = reader.integer("attention_context_right", least=0)
    if right > 1:
        reader.refuse("attention_context_right", "0 or 1: an encoder that looks ahead cannot be streamed")
    return right


def _channels(reader: _Reader) -> tuple[int, int]:
    channels = reader.value("subsampling_conv_channels")
    good = isinstance(channels, list | tuple) and len(channels) == 2
    if not good or not all(isinstance(count, int) and count >= 1 for count in channels) or channels[0] < 4:
        reader.refuse("subsampling_conv_channels", "two integers, the first of at least 4")
    return (channels[0], channels[1])


def _relative_positions(*, chunk: int, left: int, right: int) -> tuple[int | None, ...]:
    """The position whose sinusoid biases each distance left - 2 … 0.

    transformers gives a block's context of C keys the positions C//2 … 0 from its left end on: for the Hub's
    sizes a position is a distance, for others it is shifted, and keys beyond the last position get no bias.
    """
    context = chunk + left - 1 + right
    positions = [context // 2 - place for place in range(1, left)]
    return tuple(position if position >= 0 else None for position in positions)
