"""The arithmetic of bench/operators.py and bench/peers.py: profiles become tables, figures become ratios."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in ("operators", "peers", "peer_llama", "peer_litert", "common"):
        sys.modules.pop(name, None)


def event(name: str, start: int, duration: int, operator: str = "") -> dict:
    return dict(
        name=name, cat="Node" if operator else "Session", ts=start, dur=duration, args=dict(op_name=operator)
    )


def test_a_profile_becomes_the_median_of_runs_without_the_first_ones(bench) -> None:
    operators = bench("operators")
    lower, upper = [], []
    for run, product in enumerate([9000, 9000, 9000, 1000, 3000, 2000]):
        start = 100_000 * run
        lower += [
            event("model_run", start, 90_000),
            event("a_kernel_time", start + 10, product, "MatMulNBits"),
            event("b_kernel_time", start + 20_000, 500, "Add"),
        ]
        # Another part's clock begins elsewhere; what both compute counts twice.
        upper += [
            event("model_run", start + 70_000, 20_000),
            event("b_kernel_time", start + 80_000, 500, "Add"),
        ]
    rows = operators.summarize([lower, upper], {"a": operators.Node("mlp.gate_proj", 4_000_000)})
    assert [(row.operator, row.calls, row.ms) for row in rows] == [("mlp.gate_proj", 1, 2.0), ("Add", 2, 1.0)]
    assert rows[0].gb_s == pytest.approx(2.0)


def test_weights_are_named_by_their_place_in_a_layer(bench) -> None:
    product = bench("operators")._product
    assert product("layers.13.mlp.gate_proj.weight.blocks") == "mlp.gate_proj"
    assert product("embed_tokens.weight.scales") == product("lm_head.weight.blocks") == "head"


def test_ratios_are_ours_to_each_peers(bench) -> None:
    peers = bench("peers")
    ours = {"decode": {0: 20.0, 1024: 10.0}, "prefill": {128: 100.0, 1024: 90.0}, "peak_bytes": 3}
    llama = {"decode": {0: 10.0, 1024: 12.5}, "prefill": {128: 50.0, 1024: 30.0}, "peak_bytes": 4}
    assert peers.ratios({"b": ours, peers.LLAMA: llama}, "b", {"b": Path("b")}) == {
        peers.LLAMA: {"decode": {0: 2.0, 1024: 0.8}, "prefill": {128: 2.0, 1024: 3.0}, "peak_bytes": 0.75}
    }


def test_each_program_runs_its_own_model(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = bench("peers")
    ran: list[str] = []
    for module, names in (
        (peers.peer_llama, ("build", "fetch", "write_model")),
        (peers.peer_litert, ["install"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, **__: Path("program"))
        monkeypatch.setattr(module, "run", lambda program, model, **_: ran.append(model.name))
    (tmp_path / "mix.litertlm").touch()
    (tmp_path / "int4.litertlm").touch()
    args = argparse.Namespace(work=tmp_path, model="e2b", bundles=[], no_amx=False, threads=2)
    runners = peers.prepare(args)
    for runner in runners.values():
        runner()
    assert [*runners] == ["llama.cpp", "LiteRT-LM 2/4-bit", "LiteRT-LM int4"]
    assert ran == ["e2b-q4_0.gguf", "mix.litertlm", "int4.litertlm"]


def test_ours_runs_with_own_and_with_packed_weights(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Packed once, into the peers' folder; what fits is not packed again."""
    peers = bench("peers")
    shape = peers.model_of("e2b").geometry
    bundle = SimpleNamespace(manifest=SimpleNamespace(geometry=shape))
    monkeypatch.setattr(peers, "open_bundle", lambda path: bundle)
    monkeypatch.setattr(peers, "misfit", lambda bundle, folder: None if folder.exists() else "not there")
    monkeypatch.setattr(peers, "make", lambda bundle, folder: folder.mkdir())
    for name in ("build", "fetch", "write_model"):
        monkeypatch.setattr(peers.peer_llama, name, lambda *_, **__: Path("program"))
    commands: list[list[str]] = []

    def measured(command: list[str]) -> tuple[str, int]:
        commands.append(command)
        speeds = dict(prefill_tok_s=1.0, decode_tok_s=1.0)
        return json.dumps({"rows": [dict(prompt_tokens=tokens, **speeds) for tokens in (1, 128, 1024)]}), 5

    monkeypatch.setattr(peers, "measured_process", measured)
    args = argparse.Namespace(
        work=tmp_path / "peers", model="e2b", bundles=[tmp_path / "a"], no_amx=False, threads=2
    )
    for _ in range(2):
        runners = peers.prepare(args)
    assert [*runners] == ["a", "a, packed", "llama.cpp"]
    assert runners["a"]()["peak_bytes"] == runners["a, packed"]()["peak_bytes"] == 5
    assert ["--prepared" in command for command in commands] == [False, True]
    assert commands[1][commands[1].index("--prepared") + 1] == str(tmp_path / "peers" / "a-packed")


def test_a_process_is_measured_and_its_failure_shown(bench) -> None:
    measured_process = bench("common").measured_process
    out, peak_bytes = measured_process([sys.executable, "-c", "print('said')"])
    assert out == "said\n" and 1e6 < peak_bytes < 1e9
    with pytest.raises(SystemExit, match=r"status 3\nwhy not"):
        measured_process([sys.executable, "-c", "import sys; sys.stderr.write('why not'); sys.exit(3)"])


def test_the_text_model_alone_goes_to_litert(bench, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "config.json").write_text('{"audio_config": {"a": 1}, "text_config": {"b": 2}}')
    view = bench("peer_litert").text_only(checkpoint, tmp_path / "view")
    assert (view / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((view / "config.json").read_text()) == {
        "audio_config": None, "vision_config": None, "text_config": {"b": 2},
    }  # fmt: skip


def test_the_peers_model_has_as_many_weights_as_ours(bench) -> None:
    """E2B: what a token reads, 1.88 G in layers and 0.40 G in the head, and two tables."""
    from gemma_edge.export.sizes import model_of

    tensors = dict(bench("peer_llama")._tensors(model_of("e2b")))
    layers = sum(
        shape[0] * shape[1] for name, shape in tensors.items() if name.startswith("blk.") and len(shape) == 2
    )
    assert layers == pytest.approx(1.863e9, rel=0.01)
    assert tensors["token_embd.weight"] == (262144, 1536)
    assert tensors["per_layer_token_embd.weight"] == (262144, 35 * 256)
    assert tensors["blk.20.ffn_gate.weight"] == (12288, 1536) and "blk.20.attn_k.weight" not in tensors
