"""Random audio encoders of any shape in transformers, with bounds that clip, and their reference outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Gemma4AudioConfig, Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4AudioAttention,
    Gemma4AudioModel,
    Gemma4ClippableLinear,
    Gemma4MultimodalEmbedder,
)

# E2B's audio_config in small: two layers, and 128 log-mel bins, which real sound needs.
TINY: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    subsampling_conv_channels=[128, 4],
    output_proj_dims=24,
)
FULL_SIZE: dict[str, Any] = dict()  # the config's defaults are E2B's


class AudioEncoder(nn.Module):
    """The two parts of a checkpoint that make soft tokens, under their names."""

    def __init__(self, fields: dict[str, Any], text_hidden_size: int) -> None:
        super().__init__()
        self.config = Gemma4AudioConfig(**fields)
        self.config._attn_implementation = "eager"
        self.audio_tower = Gemma4AudioModel(self.config)
        text = Gemma4TextConfig(hidden_size=text_hidden_size)
        self.embed_audio = Gemma4MultimodalEmbedder(self.config, text)

    def soft_tokens(self, frames: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """frames (frames, bins), mask (frames,) of valid ones -> (tokens, text hidden), valid ones only."""
        given = torch.ones(len(frames), dtype=torch.bool) if mask is None else torch.from_numpy(mask)
        with torch.no_grad():
            out = self.audio_tower(torch.from_numpy(frames)[None], given[None], return_dict=True)
            tokens = self.embed_audio(inputs_embeds=out.last_hidden_state)
        return tokens[out.attention_mask].numpy()


def random_audio_encoder(fields: dict[str, Any], text_hidden_size: int, seed: int) -> AudioEncoder:
    """Activations near 1 throughout, norm weights 0.5-1.5, bounds at one to three deviations."""
    torch.manual_seed(seed)
    encoder = AudioEncoder(fields, text_hidden_size).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        for module in encoder.modules():
            if isinstance(module, Gemma4AudioAttention):
                module.per_dim_scale.uniform_(-1, 1)
            elif isinstance(module, Gemma4ClippableLinear) and module.use_clipped_linears:
                for bound in (module.input_max, module.output_max):
                    bound.uniform_(1, 3)
                for bound in (module.input_min, module.output_min):
                    bound.uniform_(-3, -1)
    return encoder


def random_frames(count: int, bins: int, seed: int = 0) -> np.ndarray:
    """Noise that looks like log-mel frames: (count, bins), about -7 to 5, neighbours alike."""
    noise = np.random.default_rng(seed).normal(size=(count + 4, bins))
    smooth = sum(noise[lag : lag + count] for lag in range(5)) - 1
    return smooth.astype(np.float32)


def processor_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """processor_config.json that goes with an audio config."""
    bins = Gemma4AudioConfig(**fields).subsampling_conv_channels[0] // 4 * 4
    extractor = dict(
        feature_extractor_type="Gemma4AudioFeatureExtractor", feature_size=bins, sampling_rate=16_000
    )
    return dict(processor_class="Gemma4Processor", audio_seq_length=750, feature_extractor=extractor)
