"""What an export does about audio: the manifest's part, models and exports without it, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import Gemma4AudioFeatureExtractor

from gemma_edge.cli import main
from gemma_edge.export.audio_geometry import parse_audio_model
from gemma_edge.export.audio_settings import read_mel_settings
from gemma_edge.export.bundle import write_bundle
from gemma_edge.export.checkpoint import CheckpointError
from gemma_edge.export.plan import BudgetError, total_bytes
from gemma_edge.export.report import report
from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.errors import ConfigError

from .support.tiny_audio import TINY
from .support.tiny_bundles import prepare_tiny
from .support.tiny_checkpoint import write_tiny_checkpoint

ONE_LAYER = dict(num_hidden_layers=1, layer_types=["full_attention"], num_kv_shared_layers=0)
FILES = {"audio_encoder.onnx", "audio_encoder_stream.onnx", "audio_encoder.onnx.data"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "checkpoint", audio=TINY, **ONE_LAYER)


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def parse(**changes: Any):
    return parse_audio_model(dict(audio_config=dict(changes)), "config.json", text_hidden_size=1536)


def test_the_manifest_describes_the_encoder(tiny_bundle):
    manifest = tiny_bundle(model=dict(audio=TINY, **ONE_LAYER)).bundle.manifest
    audio = manifest.audio
    assert audio is not None and set(manifest.files) >= FILES
    assert (audio.hidden_size, audio.frames_per_token, audio.tokens_per_s) == (64, 4, 25.0)
    assert (audio.max_tokens, audio.chunk_tokens) == (750, 12)
    assert (audio.tokens.placeholder, audio.tokens.begin, audio.tokens.end) == (20, 18, 22)
    mel = audio.mel
    assert (mel.sampling_rate, mel.bins, mel.frame_length, mel.hop_length) == (16_000, 128, 320, 160)
    assert (mel.fft_length, mel.mel_floor, mel.per_bin_mean) == (512, 1e-3, None)
    shapes = {tensor.name: tensor.shape for tensor in audio.state}
    assert list(shapes)[:3] == ["tokens", "frames", "subsampled"]
    assert shapes["1.key"] == shapes["1.value"] == (1, 11, 32) and shapes["1.conv"] == (1, 4, 32)
    assert len(shapes) == 3 + 3 * TINY["num_hidden_layers"]
    stored = manifest.files["audio_encoder.onnx.data"].size_bytes
    assert stored < manifest.memory.audio_bytes < stored + (60 << 20)
    assert total_bytes(manifest.memory) > manifest.memory.audio_bytes + manifest.memory.weights_bytes


def test_the_closing_report_counts_the_encoder(checkpoint: Path, tmp_path: Path):
    prepared = prepare_tiny(checkpoint, tmp_path / "bundle")
    text = report(tmp_path / "bundle", prepared, write_bundle(prepared))
    assert "audio encoder, while it is open" in text and "audio_encoder.onnx.data" in text


def test_a_model_without_ears(tiny_bundle):
    for layout in ("text", "multimodal"):
        bundle = tiny_bundle(model=dict(layout=layout, **ONE_LAYER)).bundle
        assert bundle.manifest.audio is None and bundle.manifest.memory.audio_bytes == 0
        assert not FILES & set(bundle.manifest.files)


def test_audio_can_be_left_out(checkpoint: Path, tmp_path: Path, caplog, capsys):
    out = tmp_path / "bundle"
    command = ["export", "--model", str(checkpoint), "--device", "x86-64-generic", "--recipe", "fp32"]
    assert main([*command, "--no-audio", "--context", "128", "--out", str(out)]) == 0
    assert open_bundle(out).manifest.audio is None
    assert "not used" not in caplog.text.replace("embed_vision", "")


def test_the_budget_counts_the_encoder(checkpoint: Path, tmp_path: Path):
    needed = total_bytes(prepare_tiny(checkpoint, tmp_path / "bundle").plan.memory)
    budget_mib = needed >> 20  # rounded down: a part of a MiB too little
    with pytest.raises(BudgetError, match=r"audio encoder \d+ MiB.*--no-audio leaves"):
        prepare_tiny(checkpoint, tmp_path / "bundle", budget_mib=budget_mib, context=4096)


def test_a_missing_bound_is_found_before_the_work(checkpoint: Path, tmp_path: Path):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.audio_tower.layers.1.lconv1d.linear_start.output_max"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"audio_tower\.layers\.1\.lconv1d\.linear_start\.output_max"):
        prepare_tiny(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("name", ["self_attn.relative_k_proj.weight", "self_attn.per_dim_scale"])
def test_a_missing_tensor_that_becomes_a_constant_is_found_too(checkpoint: Path, tmp_path: Path, name: str):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[f"model.audio_tower.layers.0.{name}"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(name)):
        prepare_tiny(checkpoint, tmp_path / "out")


def test_the_hubs_geometry():
    model = parse()
    assert model is not None
    assert (model.hidden_size, model.num_layers, model.mel_bins, model.quarter_bins) == (1024, 12, 128, 32)
    assert model.left_tokens == 11 and model.relative_positions == tuple(range(11, -1, -1))
    assert parse_audio_model(dict(audio_config=None), "config.json", text_hidden_size=1) is None
    assert parse_audio_model(dict(), "config.json", text_hidden_size=1) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(model_type="gemma3n_audio"), "'gemma3n_audio'"),
        (dict(attention_context_right=2), "attention_context_right is 2"),
        (dict(attention_context_left=2), "attention_context_left is 2"),
        (dict(attention_invalid_logits_value=-100.0), "attention_invalid_logits_value is -100.0"),
        (dict(attention_logit_cap=0.0), "attention_logit_cap is 0.0"),
        (dict(hidden_act="quick_gelu"), "hidden_act is 'quick_gelu'"),
        (dict(hidden_size=1000, num_attention_heads=3), "hidden_size is 1000"),
        (dict(subsampling_conv_channels=[128]), "subsampling_conv_channels is [128]"),
        (dict(subsampling_conv_channels=[3, 4]), "subsampling_conv_channels"),
        (dict(conv_kernel_size=1), "conv_kernel_size is 1"),
        (dict(num_hidden_layers="many"), "num_hidden_layers is 'many'"),
        (dict(residual_weight=None, gradient_clipping="big"), "gradient_clipping is 'big'"),
    ],
)
def test_what_is_refused_is_named(changes: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=re.escape(named)):
        parse(**changes)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(feature_size=80, sampling_rate=22_050, frame_length_ms=25.0, hop_length_ms=12.0),
        dict(fft_overdrive=True, preemphasis=0.97, preemphasis_htk_flavor=False, mel_floor=1e-5),
        dict(per_bin_mean=[0.5] * 128, per_bin_stddev=[2.0] * 128, input_scale_factor=0.5),
    ],
)
def test_settings_are_read_as_transformers_saves_them(tmp_path: Path, settings: dict[str, Any]):
    extractor = Gemma4AudioFeatureExtractor(**settings)
    saved = json.loads(extractor.to_json_string())
    # A saved extractor holds samples, which transformers ignores when it reads them: it takes milliseconds.
    saved |= {name: value for name, value in settings.items() if name.endswith("_ms")}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    flat = read_mel_settings(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(feature_extractor=saved)))
    assert read_mel_settings(tmp_path) == flat
    assert (flat.frame_length, flat.hop_length) == (extractor.frame_length, extractor.hop_length)
    assert (flat.fft_length, flat.bins) == (extractor.fft_length, extractor.feature_size)
    assert flat.mel_floor == extractor.mel_floor and flat.preemphasis == extractor.preemphasis


def test_settings_default_to_transformers(tmp_path: Path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(dict(image_processor_type="Gemma4", size=5))
    )
    assert read_mel_settings(tmp_path).bins == 128
    (tmp_path / "preprocessor_config.json").unlink()
    assert read_mel_settings(tmp_path).sampling_rate == 16_000


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(dither=1e-4), "dither"),
        (dict(feature_extractor_type="WhisperFeatureExtractor"), "WhisperFeatureExtractor"),
        (dict(sampling_rate=22_050, frame_length=320), "frame_length is 320"),
        (dict(max_frequency=9000.0), "9000.0 Hz"),
        (dict(mel_floor=0), "mel_floor is 0"),
        (dict(per_bin_mean=[0.0] * 3), "per_bin_mean: expected 128 numbers"),
        (dict(per_bin_stddev=[0.0] * 128), "per_bin_stddev has a zero"),
        (dict(hop_length_ms=0.001), "hop_length_ms is less than a sample"),
    ],
)
def test_settings_that_cannot_be_reproduced_are_named(tmp_path: Path, settings: dict[str, Any], named: str):
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(feature_extractor=settings)))
    with pytest.raises(ConfigError, match=re.escape(named)):
        read_mel_settings(tmp_path)


def test_parts_that_do_not_belong_together_are_named(checkpoint: Path, tmp_path: Path):
    change(checkpoint / "processor_config.json", feature_extractor=dict(feature_size=80))
    with pytest.raises(ConfigError, match=r"makes 80 log-mel bins.* take 128"):
        prepare_tiny(checkpoint, tmp_path / "out")
    change(checkpoint / "processor_config.json", feature_extractor=dict(feature_size=128), audio_seq_length=0)
    with pytest.raises(ConfigError, match="audio_seq_length is 0"):
        prepare_tiny(checkpoint, tmp_path / "out")
    change(checkpoint / "processor_config.json", audio_seq_length=100)
    change(checkpoint / "config.json", audio_token_id=258_881)
    with pytest.raises(ConfigError, match="audio_token_id is 258881, expected a token id under 512"):
        prepare_tiny(checkpoint, tmp_path / "out")
    (checkpoint / "processor_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        prepare_tiny(checkpoint, tmp_path / "out")


def test_progress_covers_the_encoder(checkpoint: Path, tmp_path: Path):
    prepared = prepare_tiny(checkpoint, tmp_path / "bundle")
    done = [0]

    def progress(name: str, weights: int) -> None:
        done[0] += weights

    write_bundle(prepared, progress)
    assert done[0] == prepared.weight_count
