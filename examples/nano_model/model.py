"""The nano model's shape: every trait of Gemma 4 E2B at small size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4TextConfig

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


def full_config() -> Gemma4Config:
    """The configuration that is saved: the text model inside Gemma 4's multimodal layout, no towers yet."""
    return Gemma4Config(
        text_config=text_config(),
        vision_config=None,
        audio_config=None,
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


@torch.no_grad()
def new_model(seed: int) -> Gemma4ForCausalLM:
    """A fresh model in float32.

    Gemma 4 attends with scale 1.0, so the norms of queries and keys carry the usual 1/sqrt(head_dim) at the
    start. Layer scalars are buffers, fixed away from 1 as in the real checkpoints.
    """
    torch.manual_seed(seed)
    config = text_config()
    model = Gemma4ForCausalLM(config)
    depth = config.num_hidden_layers
    for name, parameter in model.named_parameters():
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
    for index, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(0.85 + 0.25 * ((index * 7) % depth) / depth)
    return model


@torch.no_grad()
def load_weights(model: Gemma4ForCausalLM, folder: Path) -> None:
    """Take the weights of a checkpoint that `save_model` wrote."""
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    own = model.state_dict()
    for name, tensor in state.items():
        own[f"model.{name.removeprefix('model.language_model.')}"].copy_(tensor)


def save_model(model: Gemma4ForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and bf16 weights under the Hub's names, in shards."""
    import json

    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    full_config().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation_config(), indent=2) + "\n")
    state = {
        f"model.language_model.{name.removeprefix('model.')}": tensor.detach()
        .to(torch.bfloat16)
        .cpu()
        .contiguous()
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
