"""Writes small qat-mobile checkpoints that hear, with transformers' whole model and quantized classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import Gemma4AudioConfig, Gemma4Config, Gemma4ForConditionalGeneration

from gemma_edge.export.synthetic import known_config

from .tiny_audio import TINY, AudioEncoder, processor_fields, random_audio_encoder
from .tiny_checkpoint import SPECIAL_TOKENS, random_model, tiny_config, write_tokenizer_files
from .tiny_qat import quantized

TEXT: dict[str, Any] = dict(
    num_hidden_layers=2,
    num_kv_shared_layers=0,
    layer_types=["sliding_attention", "full_attention"],
    tie_word_embeddings=False,
)


def google_layout() -> dict[str, Any]:
    """E2B's own: 2 bits in the tower, 4 in lconv1d.linear_start, four kinds of linears left as floats."""
    fields = known_config("e2b", "qat-mobile")["quantization_config"]
    return {name: value for name, value in fields.items() if name != "quant_method"}


def hearing_qat_model(
    *, layout: dict[str, Any] | None = None, seed: int = 0, audio: dict[str, Any] | None = None
) -> Gemma4ForConditionalGeneration:
    """Random weights in transformers' whole model, rounded to `layout`'s bits (Google's), not calibrated."""
    text, ears = tiny_config(**TEXT), random_audio_encoder(audio or TINY, 64, seed)
    config = Gemma4Config(
        text_config=text,
        audio_config=Gemma4AudioConfig(**(audio or TINY)),
        vision_config=None,
        audio_token_id=SPECIAL_TOKENS.index("<|audio|>"),
        boa_token_id=SPECIAL_TOKENS.index("<|audio>"),
        eoa_token_id=SPECIAL_TOKENS.index("<audio|>"),
    )
    config._attn_implementation = "eager"
    model, language = Gemma4ForConditionalGeneration(config), random_model(text, seed)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.model.audio_tower.load_state_dict(ears.audio_tower.state_dict())
    model.model.embed_audio.load_state_dict(ears.embed_audio.state_dict())
    return quantized(model, layout=layout or google_layout())


def ears_of(model: Gemma4ForConditionalGeneration) -> AudioEncoder:
    """The model's own tower and embedder, with `soft_tokens`."""
    ears = AudioEncoder.__new__(AudioEncoder)
    super(AudioEncoder, ears).__init__()
    ears.config = model.config.audio_config
    ears.audio_tower, ears.embed_audio = model.model.audio_tower, model.model.embed_audio
    return ears.eval()


def write_hearing_qat_checkpoint(folder: Path, model: Gemma4ForConditionalGeneration) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | dict(
        architectures=["Gemma4ForConditionalGeneration"], dtype="float32", tie_word_embeddings=False
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    fields = processor_fields(model.config.audio_config.to_diff_dict())
    (folder / "processor_config.json").write_text(json.dumps(fields) + "\n")
    write_tokenizer_files(folder, model.config.text_config.vocab_size)
    return folder
