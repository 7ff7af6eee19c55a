"""Reading weights: layouts of the Hub, number types, and every damage found before the work."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_edge.export.checkpoint import CheckpointError, open_checkpoint
from gemma_edge.runtime.errors import ConfigError

from .support.tiny_bundles import prepare_tiny
from .support.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "checkpoint", num_hidden_layers=2, num_kv_shared_layers=0)


def test_layouts_give_the_same_tensors(tmp_path: Path):
    plain = open_checkpoint(write_tiny_checkpoint(tmp_path / "plain", seed=3))
    hub = open_checkpoint(write_tiny_checkpoint(tmp_path / "hub", seed=3, layout="multimodal", shards=3))
    prepared = prepare_tiny(tmp_path / "hub", tmp_path / "out")
    assert not any("vision" in name for name in hub.tensors)
    assert "layers.7.self_attn.k_proj.weight" in hub.tensors  # dead, and not asked for
    assert "layers.7.self_attn.k_proj.weight" not in prepared.plan.shapes
    assert set(prepared.plan.shapes) == set(plain.tensors)
    for name in prepared.plan.shapes:
        np.testing.assert_array_equal(plain.read(name), hub.read(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_number_types(tmp_path: Path, dtype: torch.dtype):
    values = torch.tensor([[1.0, -2.5, 3.14159, 1e-3], [0.0, -0.0, 65504.0, 7.0]], dtype=dtype)
    save_file({"model.norm.weight": values}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.read("norm.weight"), values.float().numpy())
    np.testing.assert_array_equal(
        np.concatenate(list(checkpoint.rows("norm.weight"))), values.float().numpy()
    )


def test_big_tensors_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gemma_edge.export.checkpoint.CHUNK_BYTES", 1024)
    values = torch.randn(100, 16)
    save_file({"w": values}, tmp_path / "model.safetensors")
    pieces = list(open_checkpoint(tmp_path).rows("w"))
    assert [len(piece) for piece in pieces] == [16] * 6 + [4]
    np.testing.assert_array_equal(np.concatenate(pieces), values.numpy())


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_named(checkpoint: Path, tmp_path: Path):
    change_tensors(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        prepare_tiny(checkpoint, tmp_path / "out")


def test_a_wrong_shape_is_named(checkpoint: Path, tmp_path: Path):
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(65)

    change_tensors(checkpoint, widen)
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight has shape \(65,\), config.json asks for \(64,\)"
    ):
        prepare_tiny(checkpoint, tmp_path / "out")


def test_a_number_type_that_cannot_be_read_is_named(checkpoint: Path, tmp_path: Path):
    def as_integers(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)

    change_tensors(checkpoint, as_integers)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is I8, expected BF16, F16, F32"):
        prepare_tiny(checkpoint, tmp_path / "out")

    def as_float8(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(64).to(torch.float8_e4m3fn)

    change_tensors(checkpoint, as_float8)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: model\.norm\.weight is F8_E4M3, expected"
    ):
        prepare_tiny(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_found_before_the_work(checkpoint: Path, tmp_path: Path, size: int):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*download it again"):
        prepare_tiny(checkpoint, tmp_path / "out")


def test_a_damaged_header_is_refused(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"not json" + bytes(100))
    with pytest.raises(CheckpointError, match="header is damaged"):
        open_checkpoint(tmp_path)
    header = json.dumps({"w": dict(dtype="F32", shape=[10], data_offsets=[0, 4])}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    with pytest.raises(CheckpointError, match="w has 4 bytes"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        dict(dtype="F32", shape=[1]),
        dict(dtype="F32", shape=[1], data_offsets=[0]),
        dict(dtype="F32", shape="wide", data_offsets=[0, 4]),
        dict(shape=[1], data_offsets=[0, 4]),
        [1, 2],
    ],
)
def test_a_damaged_entry_of_a_header_is_named(tmp_path: Path, fields: object):
    header = json.dumps({"__metadata__": {}, "w": fields}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its safetensors header is damaged at w"):
        open_checkpoint(tmp_path)


def test_negative_lengths_are_refused(tmp_path: Path):
    header = json.dumps({"w": dict(dtype="F32", shape=[-1, -1], data_offsets=[0, 4])}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    with pytest.raises(CheckpointError, match=r"w has 4 bytes, its shape \(-1, -1\) needs another number"):
        open_checkpoint(tmp_path)


def test_what_git_leaves_without_lfs_is_named(tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a Git LFS pointer \(\d+ bytes\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "no JSON",
        "{}",
        '{"weight_map": 3}',
        "[]",
        '{"weight_map": {"w": "../secret"}}',
        '{"weight_map": {"w": ["a"]}}',
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, index: str):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: .*download it again"):
        open_checkpoint(tmp_path)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path):
    save_file(
        {"model.norm.weight": torch.ones(4), "norm.weight": torch.ones(4)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"norm\.weight is also in model\.safetensors, as .*norm\.weight"
    ):
        open_checkpoint(tmp_path)


def test_the_shard_that_lacks_a_tensor_is_named(tmp_path: Path):
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", shards=2)
    shard = "model-00001-of-00002.safetensors"
    tensors = load_file(folder / shard)
    name = next(name for name in tensors if ".mlp." in name)
    del tensors[name]
    save_file(tensors, folder / shard)
    expected = rf"{shard}: tensor {name.removeprefix('model.')} is missing".replace(".", r"\.")
    with pytest.raises(CheckpointError, match=expected):
        prepare_tiny(folder, tmp_path / "out")


def test_a_truncated_shard_is_found_before_the_work(tmp_path: Path):
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=rf"{shard.name}: truncated: \S+ ends at byte .*download it again"
    ):
        prepare_tiny(folder, tmp_path / "out")


def test_a_missing_shard_is_named(tmp_path: Path):
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: no such file"):
        prepare_tiny(folder, tmp_path / "out")


def test_moe_is_refused_by_name(checkpoint: Path, tmp_path: Path):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | dict(enable_moe_block=True)))
    with pytest.raises(ConfigError, match="mixture of experts"):
        prepare_tiny(checkpoint, tmp_path / "out")
