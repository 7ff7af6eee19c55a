"""Synthetic checkpoints: transformers reads them whole, and their sizes are those of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma4ForConditionalGeneration

from gemma_edge.export.checkpoint import open_checkpoint, read_bytes
from gemma_edge.export.synthetic import MODELS, known_config, main, tensors_of, write_checkpoint
from gemma_edge.export.synthetic_tokenizer import CONTROLS, write_tokenizer
from gemma_edge.export.token_table import write_token_table
from gemma_edge.runtime.tokenizer import Tokenizer

from .support.tiny_bundles import prepare_tiny


def small_config(layout: str) -> dict[str, Any]:
    """E2B with ten narrow layers, five of them KV-shared, and towers of one layer."""
    config = known_config("e2b", layout)
    config["text_config"] |= dict(
        vocab_size=1024,
        vocab_size_per_layer_input=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=10,
        num_kv_shared_layers=5,
        layer_types=["full_attention" if (i + 1) % 5 == 0 else "sliding_attention" for i in range(10)],
        num_attention_heads=4,
        head_dim=16,
        global_head_dim=32,
        hidden_size_per_layer_input=16,
        sliding_window=8,
        max_position_embeddings=4096,
    )
    names = (
        "boi_token_id",
        "eoi_token_id",
        "image_token_id",
        "video_token_id",
        "boa_token_id",
        "audio_token_id",
    )
    config |= {name: 1000 + number for number, name in enumerate((*names, "eoa_token_index"))}
    config["audio_config"] |= dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config["audio_config"] |= dict(output_proj_dims=64, subsampling_conv_channels=[128, 4])
    config["vision_config"] |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    config["vision_config"] |= dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    config["vision_config"] |= dict(position_embedding_size=64)
    return config


def test_transformers_finds_every_weight(tmp_path: Path):
    write_checkpoint(tmp_path, small_config("bf16"), shard_bytes=100_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "model.safetensors.index.json").is_file()
    model, report = Gemma4ForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"] and not report["unexpected_keys"]
    ids = torch.arange(300, 340)[None]
    logits = model(input_ids=ids).logits
    assert 0.5 < float(logits.detach().std()) < 10


@pytest.mark.parametrize("layout", ["bf16", "qat-mobile"])
def test_the_reader_takes_both_layouts(tmp_path: Path, layout: str):
    write_checkpoint(tmp_path / "checkpoint", small_config(layout), shard_bytes=300_000)
    tensors = open_checkpoint(tmp_path / "checkpoint").tensors
    assert "layers.7.self_attn.k_proj.weight" in tensors  # dead
    originals = {entry.original_name for entry in tensors.values()}
    assert not any("vision_tower" in name for name in originals)
    assert ("lm_head.weight" in originals) == (layout == "qat-mobile")
    recipe = "qat-mobile" if layout == "qat-mobile" else "int4"
    prepared = prepare_tiny(tmp_path / "checkpoint", tmp_path / "out", recipe=recipe)
    assert "layers.7.self_attn.k_proj.weight" not in prepared.plan.shapes


@pytest.mark.parametrize(
    ("model", "layout", "gigabytes"),
    [
        ("e2b", "bf16", 10.25),
        ("e4b", "bf16", 15.99),
        ("e2b", "qat-mobile", 2.42),
        ("e4b", "qat-mobile", 3.48),
    ],
)
def test_sizes_are_those_of_the_real_checkpoints(model: str, layout: str, gigabytes: float):
    """google/gemma-4-E2B-it has 10.25 GB, its qat-mobile sibling 2.46."""
    assert sum(
        tensor.size_bytes for tensor in tensors_of(known_config(model, layout))
    ) / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_packed_levels_are_spread_like_weights(tmp_path: Path):
    config = small_config("qat-mobile")
    write_checkpoint(tmp_path, config)
    checkpoint = open_checkpoint(tmp_path)
    [table] = [name for name in checkpoint.tensors if name.startswith("embed_tokens_per_layer.embedding_q")]
    entry = checkpoint.entry(table)
    assert entry.shape == (1024, 10 * 16 // 2)
    assert checkpoint.entry("embed_tokens_per_layer.embedding_scale").shape == (1024, 10)
    packed = np.frombuffer(read_bytes(entry, 0, 1024 * 80), np.uint8)
    levels = np.concatenate([packed & 15, packed >> 4])
    assert abs(float(levels.mean()) - 8) < 0.3 and 2.5 < float(levels.std()) < 3.5


def test_the_tokenizer_has_gemma_4s_ids(tmp_path: Path):
    write_tokenizer(tmp_path, 4096)
    write_token_table(tmp_path / "tokenizer.json", tmp_path / "tokenizer.table")  # and compares the two
    tokenizer = Tokenizer(tmp_path / "tokenizer.table")
    assert {tokenizer.controls[piece] for index, piece in CONTROLS.items() if index < 4096} == {
        index for index in CONTROLS if index < 4096
    }
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 106, 50]


def test_the_command_does_not_write_into_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "thesis").write_text("words")
    with pytest.raises(SystemExit):
        main(["--model", "e2b", str(tmp_path)])
    assert "not empty" in capsys.readouterr().err
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small_config("bf16")))
    with pytest.raises(SystemExit):
        main(["--model", str(config), "--layout", "qat-mobile", str(tmp_path / "out")])
    assert "goes with a quantization_config" in capsys.readouterr().err
    assert main(["--model", str(config), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file() and set(MODELS) == {"e2b", "e4b"}
