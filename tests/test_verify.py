"""`gemma-edge verify`: the streamed reference is transformers' model, and no damaged bundle passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import Gemma4ForCausalLM

from gemma_edge.cli import main
from gemma_edge.export.checkpoint import open_checkpoint
from gemma_edge.export.geometry import read_text_model
from gemma_edge.export.verify.graphs import Graphs, exact_ends
from gemma_edge.export.verify.measures import Divergence
from gemma_edge.export.verify.reference import Reference
from gemma_edge.export.verify.tensors import SourceWeights
from gemma_edge.export.verify.weights import check_weights
from gemma_edge.runtime.bundle import MANIFEST, open_bundle, sha256_file

from .support.shapes import VALUES_ARE_KEYS
from .support.tiny_bundles import TinyBundle, export_tiny
from .support.tiny_checkpoint import write_tiny_checkpoint
from .support.tiny_qat import tiny_qat_model, write_qat_checkpoint

S, F = "sliding_attention", "full_attention"
MODELS: dict[str, dict[str, Any]] = {
    "e2b": dict(),
    "own head, nothing shared": dict(
        num_hidden_layers=4, layer_types=[S, F] * 2, num_kv_shared_layers=0, tie_word_embeddings=False
    ),
    "several kv heads, last source sliding": dict(
        num_hidden_layers=5, layer_types=[F, S, S, S, F], num_kv_shared_layers=2, num_key_value_heads=2
    ),
    "values are keys, no softcap": VALUES_ARE_KEYS | dict(final_logit_softcapping=None),
}
WORDS = ("temperature", "humidity rising above the limit", "window")
PROMPTS = [
    {"messages": [dict(role="user", content=f"{word} garden"), dict(role="assistant", content=word)]}
    for word in WORDS
]


def source_weights(checkpoint: Path) -> SourceWeights:
    return SourceWeights(open_checkpoint(checkpoint), read_text_model(checkpoint))


def streamed(
    weights: SourceWeights, texts: list[list[int]]
) -> tuple[list[torch.Tensor], dict[Any, torch.Tensor]]:
    """(logits of each text, hidden states after each layer by (text, layer))"""
    reference, states = Reference(weights), {}
    hidden = reference.run(
        reference.embed(texts), lambda text, layer, found: states.setdefault((text, layer), found.clone())
    )
    return [reference.logits(rows) for rows in hidden], states


def assert_is_the_whole_model(weights: SourceWeights, model: Gemma4ForCausalLM) -> None:
    random = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 500, (length,), generator=random).tolist() for length in (40, 1, 25)]
    logits, states = streamed(weights, texts)
    for number, text in enumerate(texts):
        with torch.no_grad():
            whole = model(torch.tensor([text]), output_hidden_states=True)
        torch.testing.assert_close(logits[number], whole.logits[0], rtol=0, atol=1e-5)
        for layer, expected in enumerate(whole.hidden_states[1:-1]):  # the last one is after the norm
            # Equal to the last bit with AVX-512; AVX2's products of fewer rows round in another order.
            torch.testing.assert_close(states[number, layer], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", list(MODELS))
def test_the_streamed_reference_is_the_whole_model(tmp_path: Path, shape: str):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", seed=5, **MODELS[shape])
    model = Gemma4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert_is_the_whole_model(source_weights(checkpoint), model)


def test_a_quantized_checkpoint_is_a_reference_too(tmp_path: Path):
    """Not calibrated: without static activation scales, which the reference leaves out."""
    model = tiny_qat_model(seed=2)
    checkpoint = write_qat_checkpoint(tmp_path / "checkpoint", model)
    assert_is_the_whole_model(source_weights(checkpoint), model)


@pytest.mark.parametrize(("window", "capacity"), [(8, 8), (8, 12), (8, 100), (16, 20)])
def test_pieces_are_exact_in_every_row(window: int, capacity: int):
    """The first row of a piece finds its window in the cache, by the rule of docs/bundle.md."""
    group, start = capacity - window + 1, 0
    for end in exact_ends(300, window, capacity):
        held = end if end <= capacity else end - group * -(-(end - capacity) // group)
        assert end - held <= max(0, start - window + 1)
        start = end
    assert start == 300


def test_graphs_give_the_same_logits_as_the_reference(tiny_bundle):
    tiny: TinyBundle = tiny_bundle(model=dict(seed=7), slack=4)
    ids = torch.randint(3, 500, (90,), generator=torch.Generator().manual_seed(4)).tolist()
    logits, states = streamed(source_weights(tiny.checkpoint), [ids])
    for rows in Graphs(tiny.bundle).run(ids):
        wanted = slice(rows.start, rows.start + len(rows.logits))
        assert np.abs(rows.logits - logits[0][wanted].numpy()).max() < 1e-3
        for layer, found in enumerate(rows.layers):
            assert np.abs(found - states[0, layer][wanted].numpy()).max() < 1e-2


def test_divergence():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(6, 50, generator=generator)
    bundle = reference + 0.1 * torch.randn(6, 50, generator=generator)
    bundle[2] = -reference[2]
    found = Divergence()
    places = [(0, row + 1, row) for row in range(6)]
    found.add(reference[:4], bundle[:4], places[:4])
    found.add(reference[4:], bundle[4:], places[4:])
    p, q = reference.double().softmax(-1), bundle.double().softmax(-1)
    assert found.count == 6
    assert found.kl_mean == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    rows = torch.arange(6)
    assert found.perplexities[0] == pytest.approx(float((-p[rows, rows].log()).mean().exp()), rel=1e-5)
    assert found.perplexities[1] == pytest.approx(float((-q[rows, rows].log()).mean().exp()), rel=1e-5)
    first = found.by_text()[0]
    assert (len(found.by_text()), first.scored, first.kl_mean) == (1, 6, found.kl_mean)
    different = (p.argmax(-1) != q.argmax(-1)).nonzero()[:, 0].tolist()
    assert [difference.position for difference in found.differences] == [row + 1 for row in different]
    worst = next(difference for difference in found.differences if difference.position == 3)
    assert worst.gap == pytest.approx(float(reference[2].max() - reference[2].min()))
    assert worst.is_near_tie(100) and not worst.is_near_tie(1)


def test_a_number_added_to_all_logits_changes_nothing():
    logits, found = torch.randn(3, 40), Divergence()
    found.add(logits, logits + 2.0, [(0, 1, 1)] * 3)
    assert found.logit_error < 1e-6 and found.kl_mean < 1e-7 and not found.differences


@pytest.fixture
def bundle(tiny_bundle, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """bundle(recipe=...) -> (a copy of the bundle that may be spoilt, its checkpoint)."""

    def make(**options: Any) -> tuple[Path, Path]:
        tiny = tiny_bundle(model=dict(seed=7), **options)
        shutil.copytree(tiny.path, tmp_path / "copy")
        return tmp_path / "copy", tiny.checkpoint

    return make


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n")
    return path


def run(folder: Path, checkpoint: Path, prompts: Path) -> tuple[int, dict[str, Any]]:
    """(exit status, the JSON)"""
    report = folder.parent / "report.json"
    report.unlink(missing_ok=True)
    arguments = [
        "--model",
        str(checkpoint),
        "--prompts",
        str(prompts),
        "--json",
        str(report),
        "--threads",
        "1",
    ]
    status = main(["verify", str(folder), *arguments])
    return status, json.loads(report.read_text()) if report.exists() else {}


def outcome(report: dict[str, Any]) -> dict[str, bool | None]:
    return {check["name"].split(",")[0]: check["passed"] for check in report["checks"]}


def forge(folder: Path) -> None:
    """Write the hashes of what is there now into the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        manifest["files"][name]["sha256"] = sha256_file(folder / name)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def change_byte(folder: Path, weight: str, xor: int) -> None:
    """Change one byte in the middle of a tensor of decoder.onnx, where the file has it."""
    graph = ir.load(folder / "decoder.onnx").graph
    tensor = graph.initializers[weight].const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.length
    with (folder / tensor.location).open("r+b") as file:
        file.seek((tensor.offset or 0) + tensor.length // 2)
        old = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([old ^ xor]))


def test_a_good_bundle_passes(bundle, prompts: Path, capsys: pytest.CaptureFixture[str]):
    folder, checkpoint = bundle(recipe="fp32")
    status, report = run(folder, checkpoint, prompts)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert report["passed"] and report["limits"] == "float"
    assert "verdict: ok" in printed
    figures = {check["name"]: check["figures"] for check in report["checks"]}
    assert figures["KL divergence"]["mean"] < 1e-6
    assert len(figures["layers, 10"]["relative_errors"]) == 10
    assert report["scored"] > len(PROMPTS) and report["peak_rss_bytes"] > 0


def test_quantized_bundles_are_judged_by_their_class(bundle, prompts: Path):
    folder, checkpoint = bundle(recipe="int8")
    _, report = run(folder, checkpoint, prompts)
    assert report["limits"] == "8-bit"
    passed = outcome(report)
    assert passed["files"] and passed["weights"] and passed["embeddings"] and passed["per-layer inputs"]
    tensors = {t["name"]: t for check in report["checks"] for t in check["figures"].get("tensors", [])}
    claimed = {entry.tensor: entry.relative_error for entry in open_bundle(folder).manifest.quantization}
    assert claimed and all(
        tensors[name]["relative_error"] == pytest.approx(error) for name, error in claimed.items()
    )


def test_one_changed_level_is_found_by_its_hash_and_by_the_weights(bundle, prompts: Path):
    folder, checkpoint = bundle(recipe="int4")
    change_byte(folder, "layers.1.mlp.up_proj.weight.blocks", 0x04)
    status, report = run(folder, checkpoint, prompts)
    assert status == 1 and outcome(report)["files"] is False
    forge(folder)
    status, report = run(folder, checkpoint, prompts)
    passed = outcome(report)
    assert status == 1 and passed["files"] is True and passed["weights"] is False
    (weights,) = (check for check in report["checks"] if check["name"].startswith("weights"))
    assert weights["figures"]["faults"] == ["layers.1.mlp.up_proj.weight: 1 weights not at the nearest level"]


def test_a_changed_float_weight_spoils_what_comes_after(bundle, prompts: Path, capsys):
    folder, checkpoint = bundle(recipe="fp32")
    for name in ("layers.3.mlp.down_proj.weight", "layers.3.self_attn.q_proj.weight"):
        for _ in range(2):
            change_byte(folder, name, 0x3F)
    graph = ir.load(folder / "decoder.onnx").graph
    tensor = graph.initializers["layers.3.mlp.down_proj.weight"].const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.length
    with (folder / tensor.location).open("r+b") as file:
        file.seek(tensor.offset or 0)
        file.write(np.full(tensor.length // 4, 0.5, np.float32).tobytes())
    forge(folder)
    status, report = run(folder, checkpoint, prompts)
    passed = outcome(report)
    assert status == 1 and passed["files"] is True
    assert passed["weights"] is False and passed["KL divergence"] is False
    errors = next(
        check["figures"]["relative_errors"] for check in report["checks"] if "layers" in check["name"]
    )
    assert max(errors[:3]) < 1e-5 < 1e-2 < errors[3]
    assert "grows most in 3" in capsys.readouterr().out


def test_what_cannot_be_checked_has_a_status_of_its_own(bundle, prompts: Path, tmp_path: Path, capsys):
    folder, checkpoint = bundle(recipe="int8")
    other = write_tiny_checkpoint(tmp_path / "other", num_hidden_layers=4, layer_types=[S, F] * 2,
                                  num_kv_shared_layers=2)  # fmt: skip
    assert run(folder, other, prompts)[0] == 2
    assert "another shape" in capsys.readouterr().err
    assert run(tmp_path / "nothing", checkpoint, prompts)[0] == 2
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n')
    assert run(folder, checkpoint, tmp_path / "bad.jsonl")[0] == 2
    assert "bad.jsonl, line 1" in capsys.readouterr().err
    data = folder / "decoder.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert run(folder, checkpoint, prompts)[0] == 2
    assert "the manifest says" in capsys.readouterr().err


def test_the_same_shape_with_other_weights_is_not_the_checkpoint(bundle, prompts: Path, tmp_path: Path):
    folder, _ = bundle(recipe="int8")
    other = write_tiny_checkpoint(tmp_path / "other", seed=8)
    status, report = run(folder, other, prompts)
    passed = outcome(report)
    assert status == 1 and passed["files"] is True
    assert passed["weights"] is False and passed["embeddings"] is False and passed["KL divergence"] is False


def test_a_checkpoint_that_changes_meanwhile(tmp_path: Path):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint")
    weights = source_weights(checkpoint)
    weights.check_unchanged()
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(Exception, match="changed while it was read"):
        weights.check_unchanged()


def test_imported_weights_are_exact(tmp_path: Path):
    checkpoint = write_qat_checkpoint(tmp_path / "checkpoint", tiny_qat_model(seed=2))
    tiny = export_tiny(tmp_path, checkpoint=checkpoint, recipe="qat-mobile")
    checks = {check.name: check for check in check_weights(tiny.bundle, source_weights(checkpoint))}
    assert {check.bits for check in checks.values()} == {2, 4, 8, 32}
    projection = checks.pop("per_layer_model_projection.weight")
    assert 0 < projection.relative_error < 0.01
    assert all(check.relative_error == 0 and not check.misplaced for check in checks.values())


def test_plain_text_and_a_cap(bundle, tmp_path: Path):
    folder, checkpoint = bundle(recipe="fp32")
    (tmp_path / "text.txt").write_text("the temperature is rising and the window is not steady " * 30)
    report = tmp_path / "report.json"
    arguments = ["--model", str(checkpoint), "--prompts", str(tmp_path / "text.txt"), "--max-tokens", "30"]
    assert main(["verify", str(folder), *arguments, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert (found["tokens"], found["scored"]) == (30, 29)
