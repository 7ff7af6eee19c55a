"""Writes small qat-mobile checkpoints with transformers' own quantized classes, calibrated or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Gemma4ForCausalLM, GemmaQuantizationConfig, PreTrainedModel
from transformers.integrations.gemma_quant import (
    QuantizedEmbedding,
    QuantizedLinear,
    replace_with_quant_layers,
)

from .tiny_checkpoint import random_model, tiny_config, write_tokenizer_files

Model = TypeVar("Model", bound=PreTrainedModel)
Module = TypeVar("Module", bound=nn.Module)

# As in Google's E2B, with layer numbers of the tiny model: 2 bits in the upper layers' MLPs, head and table.
LAYOUT: dict[str, Any] = dict(
    num_bits=4,
    quantize_embeddings=True,
    module_quant_configs={
        "^lm_head$": {"num_bits": 2},
        r"model\.embed_tokens$": {"num_bits": 2},
        r"model\.embed_tokens_per_layer$": {"num_bits": 4},
        r"layers\.[0-4]\.mlp\.": {"num_bits": 4},
        r"layers\.\d+\.mlp\.": {"num_bits": 2},
        r"layers\.\d+\.per_layer_input_gate$": {"num_bits": 8},
        r"layers\.\d+\.per_layer_projection$": {"num_bits": 8},
        r"layers\.\d+\.self_attn\.": {"num_bits": 4},
    },
    modules_to_not_convert=["per_layer_model_projection", "model.vision_tower.patch_embedder"],
)


def tiny_qat_model(
    *, seed: int = 0, layout: dict[str, Any] | None = None, equal_head: bool = True, **overrides: Any
) -> Gemma4ForCausalLM:
    """A random model whose modules are transformers' quantized ones, as `layout` says, not calibrated.

    equal_head: the head's bytes are the token table's, as in Google's checkpoints.
    """
    config = tiny_config(tie_word_embeddings=False, **overrides)
    return quantized(random_model(config, seed), layout=layout, equal_head=equal_head)


def quantized(model: Model, *, layout: dict[str, Any] | None = None, equal_head: bool = True) -> Model:
    """`model` in the format, in place, weights rounded to nearest."""
    layout = LAYOUT if layout is None else layout
    text = model.config.get_text_config()
    floats = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    model.config.tie_word_embeddings = text.tie_word_embeddings = False
    model.config.quantization_config = dict(layout, quant_method="gemma")
    replace_with_quant_layers(model, GemmaQuantizationConfig(**layout), layout["modules_to_not_convert"])
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, QuantizedEmbedding):
                groups = text.num_hidden_layers if name.endswith("_per_layer") else 1
                _fill_table(module, floats[name].weight, groups)
            elif isinstance(module, QuantizedLinear):
                old = floats[name]
                module.weight.data, module.weight_scale.data = _rounded(old.weight, module.num_bits, 1)
                if module.bias is not None:
                    module.bias.data = old.bias.data
        head, table = model.lm_head, model.get_input_embeddings()
        if equal_head and isinstance(head, QuantizedLinear) and isinstance(table, QuantizedEmbedding):
            head.weight.data = table.embedding_quantized.clone()
            head.weight_scale.data = table.embedding_scale.clone()
    return model.eval()


def calibrate(model: Gemma4ForCausalLM, ids: Tensor, *, headroom: float = 0.9) -> None:
    """Set the activation scales by what the model sees in `ids`. Below 1, headroom clips the largest."""
    calibrate_on(model, lambda: model(ids), headroom=headroom)


def calibrate_on(model: nn.Module, run: Callable[[], Any], *, headroom: float = 0.9) -> None:
    """Set the activation scales of `model` by what its quantized linears see in `run`."""
    largest: dict[QuantizedLinear, list[float]] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, QuantizedLinear)
        seen = largest.setdefault(module, [0.0, 0.0])
        for index, tensor in enumerate((inputs[0], output)):
            seen[index] = max(seen[index], float(tensor.abs().max()))

    modules = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    hooks = [module.register_forward_hook(watch) for module in modules]
    without_activation_scales(model)
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    for module, (seen_in, seen_out) in largest.items():
        module.input_activation_scale.data.fill_(headroom * seen_in / 127)
        module.output_activation_scale.data.fill_(headroom * seen_out / 127)


def without_activation_scales(model: Module) -> Module:
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.input_activation_scale.data.zero_()
            module.output_activation_scale.data.zero_()
    return model


def write_qat_checkpoint(
    folder: Path,
    model: Gemma4ForCausalLM,
    *,
    change: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
) -> Path:
    """Write config, weights and tokenizer. change: is given the tensors before they are written."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    tensors |= {
        f"model.layers.{index}.self_attn.{part}_cache_scale": torch.tensor(0.1)
        for index in range(model.config.num_hidden_layers)
        for part in "kv"
    }
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | dict(architectures=["Gemma4ForCausalLM"], dtype="float32")
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    write_tokenizer_files(folder, model.config.vocab_size)
    return folder


def _fill_table(module: QuantizedEmbedding, weight: Tensor, groups: int) -> None:
    packed, scales = _rounded(weight, module.num_bits, groups)
    module.embedding_quantized.data = packed
    module.embedding_scale = nn.Parameter(scales, requires_grad=False)


def _rounded(weight: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """(packed, scales (rows, groups)) of levels rounded to nearest."""
    rows, width = weight.shape
    zero = 1 << (bits - 1)
    grouped = weight.reshape(rows, groups, width // groups)
    scales = grouped.abs().amax(-1, keepdim=True) / (zero - 0.5)
    levels = (grouped / scales).round().clamp(-zero, zero - 1).reshape(rows, width)
    scales = scales.squeeze(-1).float()
    if bits == 8:
        return levels.to(torch.int8), scales
    shifted = (levels + zero).to(torch.uint8)
    each = 8 // bits
    if short := -width % each:
        shifted = nn.functional.pad(shifted, (0, short))
    packed = sum(shifted[:, place::each] << (bits * place) for place in range(each))
    assert isinstance(packed, Tensor)
    return packed.to(torch.uint8), scales
