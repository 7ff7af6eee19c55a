"""Writes a small random Gemma 4 checkpoint in the Hub's layout, with every trait of E2B."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from .tiny_audio import processor_fields, random_audio_encoder

SPECIAL_TOKENS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
    *(
        "<|tool_response>",
        "<tool_response|>",
        '<|"|>',
        "<|think|>",
        "<|channel>",
        "<channel|>",
        "<|turn>",
        "<turn|>",
    ),
    *("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>"),
]
WORDS = (
    "temperature humidity pressure sensor kitchen garden window door light turn on off set the a is are was "
    "at to of in and not above below limit high low rising falling steady degrees percent minutes hours "
    "today value minimum maximum mean last what which how much summary title severity anomalies actions "
    "system user model thought"
).split()

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set turns = messages -%}
{%- if tools or enable_thinking or messages[0].role == 'system' -%}
{{- '<|turn>system\\n' -}}
{%- if enable_thinking -%}{{- '<|think|>' -}}{%- endif -%}
{%- if messages[0].role == 'system' -%}
{{- messages[0].content | trim -}}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- for tool in tools or [] -%}
{{- '<|tool>declaration:' + tool.function.name -}}
{{- '{description:<|"|>' + tool.function.description + '<|"|>}<tool|>' -}}
{%- endfor -%}
{{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in turns -%}
{%- if message.role == 'tool' -%}
{{- '<|tool_response>response:' + message.name -}}
{{- '{value:<|"|>' + message.content + '<|"|>}<tool_response|>' -}}
{%- else -%}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
{%- for call in message.tool_calls or [] -%}
{{- '<|tool_call>call:' + call.function.name + '{' -}}
{%- for key, value in call.function.arguments | items -%}
{{- (',' if not loop.first else '') + key + ':' -}}
{{- '<|"|>' + value + '<|"|>' if value is string else value | tojson -}}
{%- endfor -%}
{{- '}<tool_call|>' -}}
{%- endfor -%}
{%- if message.content is string or not message.content -%}
{{- (message.content or '') | trim -}}
{%- else -%}
{%- for part in message.content -%}
{{- '<|audio|>' if part.type == 'audio' else part.text | trim -}}
{%- endfor -%}
{%- endif -%}
{{- '<turn|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def write_tiny_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    layout: str = "text",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    audio: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write config, weights and tokenizer to `folder` and return it.

    layout: "text" is a Gemma4TextConfig with names `model.…`; "multimodal" is a Gemma4Config with names
    `model.language_model.…`, dead k/v weights of the shared layers and vision tensors, as on the Hub.
    audio: fields of Gemma4AudioConfig, see `tiny_audio`: the checkpoint (then multimodal) has an encoder.
    overrides: fields of Gemma4TextConfig.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**overrides)
    model = random_model(config, seed)
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    if layout == "multimodal" or audio is not None:
        weights = _as_on_the_hub(weights, config, dtype)
    if audio is not None:
        encoder = random_audio_encoder(audio, config.hidden_size, seed)
        weights |= {f"model.{name}": tensor.to(dtype) for name, tensor in encoder.state_dict().items()}
    _write_weights(folder, weights, shards)
    if layout == "text" and audio is None:
        _write_json(
            folder / "config.json", _text_fields(config, dtype) | dict(architectures=["Gemma4ForCausalLM"])
        )
    else:
        _write_multimodal_config(folder, config, dtype, overrides, audio)
    write_tokenizer_files(folder, config.vocab_size)
    return folder


def tiny_config(**overrides: Any) -> Gemma4TextConfig:
    """Ten layers, five KV-shared, window 8: E2B in small. `overrides`: fields of Gemma4TextConfig."""
    layers = overrides.get("num_hidden_layers", 10)
    fields: dict[str, Any] = dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=32,
        sliding_window=8,
        layer_types=["full_attention" if (i + 1) % 5 == 0 else "sliding_attention" for i in range(layers)],
        num_kv_shared_layers=5,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=16,
        final_logit_softcapping=30.0,
        max_position_embeddings=4096,
    )
    fields |= overrides
    fields.setdefault("vocab_size_per_layer_input", fields["vocab_size"])
    config = Gemma4TextConfig(**fields)
    config.eos_token_id = [_token("<eos>"), _token("<turn|>"), _token("<|tool_response>")]
    return config


def random_model(config: Gemma4TextConfig, seed: int) -> Gemma4ForCausalLM:
    """Weights big enough for logits of about 2, norm weights 0.5-1.5, layer scalars 0.5-1.2."""
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(12 if parameter is model.model.embed_tokens.weight else 3)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.2)
    return model


def write_tokenizer_files(folder: Path, vocab_size: int) -> None:
    """A BPE tokenizer made Gemma's way, its chat template and the generation settings."""
    train_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<pad>",
            unk_token="<unk>",
            model_max_length=4096,
        ),
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    eos = [_token("<eos>"), _token("<turn|>"), _token("<|tool_response>")]
    _write_json(
        folder / "generation_config.json",
        dict(
            bos_token_id=_token("<bos>"),
            pad_token_id=0,
            eos_token_id=eos,
            do_sample=True,
            top_k=64,
            top_p=0.95,
        ),
    )


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """BPE with byte fallback over `▁`-escaped text, special tokens first, as in Gemma's tokenizer.json."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *bytes_],
        initial_alphabet=[*map(chr, range(33, 127)), "\n", "▁", "é", "°"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    # The trainer registers the byte pieces as special tokens: they are ordinary vocabulary in Gemma's file.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIAL_TOKENS]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", _token("<bos>"))]
    )
    return tokenizer


def _corpus() -> list[str]:
    pick = random.Random(0)
    return [
        " ".join(pick.choice(WORDS) for _ in range(12))
        + f" {pick.uniform(-20, 99):.1f} °C, {pick.randrange(999)}.\n"
        for _ in range(400)
    ]


def _token(content: str) -> int:
    return SPECIAL_TOKENS.index(content)


def _as_on_the_hub(
    weights: dict[str, torch.Tensor], config: Gemma4TextConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in weights.items()}
    for index in range(config.num_hidden_layers - config.num_kv_shared_layers, config.num_hidden_layers):
        prefix = f"model.language_model.layers.{index}.self_attn."
        layer = config.per_layer_config[index]
        kv_size = layer.num_key_value_heads * layer.head_dim
        renamed[prefix + "k_proj.weight"] = torch.ones(kv_size, config.hidden_size, dtype=dtype)
        renamed[prefix + "v_proj.weight"] = torch.ones(kv_size, config.hidden_size, dtype=dtype)
        renamed[prefix + "k_norm.weight"] = torch.ones(layer.head_dim, dtype=dtype)
    renamed["model.vision_tower.patch_embedder.input_proj.weight"] = torch.ones(8, 8, dtype=dtype)
    renamed["model.embed_vision.embedding_projection.weight"] = torch.ones(8, 8, dtype=dtype)
    return renamed


def _write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    weights = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    _write_json(
        folder / "model.safetensors.index.json",
        dict(metadata=dict(total_size=total), weight_map=weight_map),
    )


def _text_fields(config: Gemma4TextConfig, dtype: torch.dtype) -> dict[str, Any]:
    return config.to_dict() | dict(dtype=str(dtype).removeprefix("torch."))


def _write_multimodal_config(
    folder: Path,
    config: Gemma4TextConfig,
    dtype: torch.dtype,
    overrides: dict[str, Any],
    audio: dict[str, Any] | None,
) -> None:
    text = _text_fields(config, dtype)
    # The Hub's files name the full-attention layers' sizes in these two fields.
    text.pop("per_layer_config", None)
    text["global_head_dim"] = overrides.get("global_head_dim", 32)
    text["num_global_key_value_heads"] = overrides.get("num_global_key_value_heads")
    _write_json(
        folder / "config.json",
        dict(
            architectures=["Gemma4ForConditionalGeneration"],
            model_type="gemma4",
            dtype=text["dtype"],
            tie_word_embeddings=True,
            eos_token_id=config.eos_token_id,
            audio_config=None if audio is None else audio | dict(model_type="gemma4_audio"),
            audio_token_id=_token("<|audio|>"),
            boa_token_id=_token("<|audio>"),
            eoa_token_index=_token("<audio|>"),
            vision_config=dict(model_type="gemma4_vision"),
            text_config=text,
        ),
    )
    if audio is not None:
        _write_json(folder / "processor_config.json", processor_fields(audio))


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
