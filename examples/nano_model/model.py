"""The nano model's shape: every trait of Gemma 4 E2B at small size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
)
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

from .tokenizer import SPECIAL, VOCAB_SIZE

# 15 layers, (4 sliding + 1 full) x 3; the last 5 read the caches of layers 8 (sliding) and 9 (full).
LAYER_TYPES = ["full_attention" if (i + 1) % 5 == 0 else "sliding_attention" for i in range(15)]
CONTEXT = 4096


def token_id(token: str) -> int:
    """Special tokens come first in the vocabulary, in the order of `SPECIAL`."""
    return SPECIAL.index(token)


def text_config() -> Gemma4TextConfig:
    """The text model's configuration."""
    return Gemma4TextConfig(
        vocab_size=VOCAB_SIZE,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=len(LAYER_TYPES),
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        global_head_dim=128,
        sliding_window=128,
        layer_types=LAYER_TYPES,
        num_kv_shared_layers=5,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=32,
        final_logit_softcapping=30.0,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=token_id("<pad>"),
        eos_token_id=token_id("<eos>"),
        bos_token_id=token_id("<bos>"),
    )


def audio_config() -> Gemma4AudioConfig:
    """The audio tower's configuration: E2B's but for depth and width."""
    return Gemma4AudioConfig(
        hidden_size=192,
        num_hidden_layers=8,
        num_attention_heads=4,
        subsampling_conv_channels=[128, 32],
        output_proj_dims=256,
    )


def full_config(*, ears: bool = False) -> Gemma4Config:
    """The configuration that is saved: the text model inside Gemma 4's multimodal layout, no eyes."""
    return Gemma4Config(
        text_config=text_config(),
        vision_config=None,
        audio_config=audio_config() if ears else None,
        boi_token_id=token_id("<|image>"),
        eoi_token_id=token_id("<image|>"),
        image_token_id=token_id("<|image|>"),
        video_token_id=token_id("<|video|>"),
        boa_token_id=token_id("<|audio>"),
        eoa_token_index=token_id("<audio|>"),
        audio_token_id=token_id("<|audio|>"),
        architectures=["Gemma4ForConditionalGeneration"],
        dtype="bfloat16",
    )


def generation_config() -> dict[str, Any]:
    """What stops a generation, as Gemma 4 says it; greedy, since all three tasks have one right answer."""
    stops = [token_id(token) for token in ("<eos>", "<turn|>", "<|tool_response>")]
    return {
        "bos_token_id": token_id("<bos>"),
        "pad_token_id": token_id("<pad>"),
        "eos_token_id": stops,
        "do_sample": False,
    }


def processor_config() -> dict[str, Any]:
    """How sound becomes frames, as the Hub's checkpoints say it."""
    extractor = json.loads(Gemma4AudioFeatureExtractor().to_json_string())
    for computed in ("mel_filters", "window"):
        extractor.pop(computed, None)
    return {
        "audio_ms_per_token": 40,
        "audio_seq_length": 750,
        "feature_extractor": extractor,
        "processor_class": "Gemma4Processor",
    }


@torch.no_grad()
def new_model(seed: int, *, ears: bool = False) -> Gemma4ForConditionalGeneration:
    """A fresh model in float32.

    Gemma 4 attends with scale 1.0, so the norms of queries and keys carry the usual 1/sqrt(head_dim) at the
    start. Layer scalars are buffers, fixed away from 1 as in the real checkpoints.
    """
    torch.manual_seed(seed)
    model = Gemma4ForConditionalGeneration(full_config(ears=ears))
    _init_text(model.model.language_model)
    if ears:
        _init_audio(model.model.audio_tower)
        projection = model.model.embed_audio.embedding_projection.weight
        projection.normal_(std=projection.shape[1] ** -0.5)  # soft tokens as large as embeddings
    return model


def _init_text(text: torch.nn.Module) -> None:
    config = text.config
    depth = config.num_hidden_layers
    for name, parameter in text.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.fill_(parameter.shape[0] ** -0.25)
        elif parameter.ndim == 2 and "embed" not in name:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        elif "embed_tokens_per_layer" in name:
            parameter.normal_(std=config.hidden_size_per_layer_input**-0.5)
        elif "embed_tokens" in name:
            # The same table is the head: its rows times sqrt(hidden_size) enter, logits leave at a sane size.
            parameter.normal_(std=config.hidden_size**-0.5)
        elif name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            parameter.fill_(1.0 / math.sqrt(2 * depth) * 2)
        elif name.endswith("post_per_layer_input_norm.weight"):
            parameter.fill_(0.3)
    for index, layer in enumerate(text.layers):
        layer.layer_scalar.fill_(0.85 + 0.25 * ((index * 7) % depth) / depth)


# The clipped linears' bounds, as the real checkpoints have them: wide of what training ever reaches.
CLIP = 60.0


def _init_audio(tower: torch.nn.Module) -> None:
    for name, parameter in tower.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("norm_post_attn.weight"):
            parameter.fill_(0.5)
    for name, buffer in tower.named_buffers():
        if name.endswith(("input_min", "output_min")):
            buffer.fill_(-CLIP)
        elif name.endswith(("input_max", "output_max")):
            buffer.fill_(CLIP)


@torch.no_grad()
def load_weights(model: Gemma4ForConditionalGeneration, folder: Path) -> None:
    """Take the weights of a checkpoint that `save_model` wrote.

    One without ears leaves the model's own; a model without ears does not take any.
    """
    from safetensors.torch import load_file

    own = model.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name in own or "audio" not in name:
                own[name].copy_(tensor)


def save_model(model: Gemma4ForConditionalGeneration, folder: Path) -> None:
    """Write the configurations and bf16 weights under the Hub's names, in shards."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    ears = model.model.audio_tower is not None
    full_config(ears=ears).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation_config(), indent=2) + "\n")
    if ears:
        (folder / "processor_config.json").write_text(json.dumps(processor_config(), indent=2) + "\n")
    state = {
        name: tensor.detach().to(torch.bfloat16).cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("lm_head.")
    }
    split = split_torch_state_dict_into_shards(state, max_shard_size=15 * 2**20)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    for filename, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=1, sort_keys=True) + "\n"
        )
