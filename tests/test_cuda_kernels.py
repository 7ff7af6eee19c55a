"""Our own CUDA kernels without a GPU: their source, run on a CPU by an emulator of blocks and warps.

What needs a GPU (races, speed, the driver) is left to `make test-cuda`; NVRTC compiles them here for the GPUs
that we name.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_edge.export.checkpoint import open_checkpoint
from gemma_edge.export.decode_step import write_decode_step
from gemma_edge.export.geometry import read_text_model
from gemma_edge.export.quantize import dequantize_rows, quantize_rows
from gemma_edge.runtime.bundle import DECODE_STEP, open_bundle
from gemma_edge.runtime.cuda_session import CudaSession, CudaSettings
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.gpu import device as device_module
from gemma_edge.runtime.gpu import step as step_module
from gemma_edge.runtime.gpu.device import SOURCE, compile_kernels
from gemma_edge.runtime.gpu.plan import Product, Region, read_step
from gemma_edge.runtime.gpu.step import Branch, DecodeStep, Launch

from .cuda.cases import CASES, Case, export, make_reference
from .cuda.checks import compare
from .support.cuda_emulator import Emulator
from .support.tiny_checkpoint import write_tiny_checkpoint

TEXT = 26  # tokens, ten past the window of most tiny models
STEPS = 12
SMALL = dict(tokens=TEXT, context=64)
SHAPES: dict[str, Case] = {
    "values are keys": replace(CASES["values are keys"], recipe="int8", **SMALL),
    "no per-layer inputs": replace(CASES["no per-layer inputs"], recipe="int4", fused=False, **SMALL),
}


@pytest.fixture(autouse=True)
def small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of several warps each, and no more of them than it takes."""
    monkeypatch.setattr(step_module, "SLIDING_SPLITS", 2)
    monkeypatch.setattr(step_module, "FULL_SPLITS", 3)
    monkeypatch.setattr(step_module, "LEAST_WARPS", 2)
    monkeypatch.setattr(step_module, "MOST_WARPS", 4)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def run(session: CudaSession, ids: np.ndarray) -> dict[int, np.ndarray]:
    """Logits by position: a prompt, then steps across the end of the window."""
    prompt = len(ids) - STEPS
    for first in range(0, prompt, session.chunk):
        part = ids[first : min(first + session.chunk, prompt)]
        session.prefill(part, first, last=first + len(part) == prompt)
    found = {}
    for position in range(prompt, len(ids)):
        session.step(int(ids[position]), position)
        found[position] = session.logits.copy()
        assert session.best() == session.logits.argmax()
    return found


def open_emulated(bundle: Path, compiled: Path) -> CudaSession:
    chosen = CudaSettings(device="cpu", kernels_on=Emulator(compiled))
    session = CudaSession(open_bundle(bundle), threads=1, settings=chosen)
    assert session.own_kernels
    return session


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A bundle whose layers share caches, and transformers' logits."""
    folder, case = tmp_path_factory.mktemp("described"), Case("int4", **SMALL)
    _, reference = make_reference(folder, case, "int4")
    export(folder / "checkpoint", folder / "bundle", "int4", case)
    return folder / "bundle", reference


@pytest.fixture(scope="module")
def bundle(described: tuple[Path, Any]) -> Path:
    return described[0]


def test_steps_equal_transformers(described: tuple[Path, Any], compiled: Path) -> None:
    """By the yardstick of the checks on a GPU: what transformers loses in float16."""
    bundle, reference = described
    figures = compare(run(open_emulated(bundle, compiled), reference["ids"]), reference)
    assert figures["positions"] == STEPS


@pytest.mark.slow  # an export each
@pytest.mark.parametrize("name", list(SHAPES))
def test_steps_of_other_models(name: str, tmp_path: Path, compiled: Path) -> None:
    case = SHAPES[name]
    _, reference = make_reference(tmp_path, case, case.recipe)
    export(tmp_path / "checkpoint", tmp_path / "bundle", case.recipe, case)
    figures = compare(run(open_emulated(tmp_path / "bundle", compiled), reference["ids"]), reference)
    assert figures["positions"] == STEPS


def test_two_bits_and_large_heads(tmp_path: Path, compiled: Path) -> None:
    """Heads of 256 and 512, two kernels of attention; against the graph."""
    (tmp_path / "two.yaml").write_text(
        "name: two\ntitle: two\nextends: int4\nrules:\n  - {weights: '*.mlp.*', bits: 2, method: nearest}\n"
    )
    model = CASES["heads of E2B"].model | dict(num_attention_heads=2, sliding_window=16)
    case = Case(str(tmp_path / "two.yaml"), model, **SMALL)
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", seed=7, **model)
    export(checkpoint, tmp_path / "bundle", case.recipe, case)
    assert_equal_to_the_graph(tmp_path / "bundle", compiled)


def assert_equal_to_the_graph(bundle: Path, compiled: Path) -> None:
    """Steps across the window, then a prompt that goes on from the caches as the steps left them."""
    ids = np.random.default_rng(3).integers(3, 500, TEXT + 5)
    want, got = {}, {}
    graph = CudaSession(open_bundle(bundle), settings=CudaSettings(device="cpu"))
    for session, found in ((graph, want), (open_emulated(bundle, compiled), got)):
        found |= run(session, ids[:TEXT])
        session.prefill(ids[TEXT:], TEXT, last=True)
        found[len(ids) - 1] = session.logits.copy()
    for position, logits in got.items():
        error = np.sqrt(np.mean((logits - want[position]) ** 2))
        # Both are of float16, rounded in other places.
        assert error < 0.03 * want[position].std(), f"{error} at {position}"


class Bench:
    """One product on the emulator: `DecodeStep`'s own launch of it, without the rest of a step."""

    def __init__(self, product: Product, folder: Path, multiprocessors: int) -> None:
        self.device = Emulator(folder, multiprocessors)
        self.step = DecodeStep.__new__(DecodeStep)
        self.step._device, self.step.launches, self.step._states = self.device, [], [1, 2]
        self.product = product

    def run(self, arrays: dict[str, np.ndarray], **options: Any) -> np.ndarray:
        held = {name: self.device.array(array) for name, array in arrays.items()}
        pointers = {name: memory.pointer for name, memory in held.items()}
        out = self.device.zeros(4 * self.product.rows)
        self.step._initializers = {"w": pointers["w"], "s": pointers["s"], "u": pointers.get("u", 0)}
        self.step._initializers |= {"v": pointers.get("v", 0)}
        self.step._plan = options.pop("plan")
        if "branch" in options:
            self.updated = self.device.zeros(4 * self.product.width)
            self.step._states = [self.updated.pointer]
        options = {
            name: pointers[value] if isinstance(value, str) else value for name, value in options.items()
        }
        self.step._product(self.product, pointers["x"], out.pointer, **options)
        copy = self.device.zeros(8), self.device.pinned(8)
        self.device.record(copy, self.step.launches)()
        return out.bytes.view(np.float32)


class Settings:
    eps, activation, softcap, hidden_size = 1e-6, "gelu_pytorch_tanh", 0.0, 0


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_products_equal_numpy(compiled: Path, data: st.DataObject) -> None:
    """Any bits, blocks, rows, widths and grids; activations that float16 cannot hold."""
    bits = data.draw(st.sampled_from([2, 4, 8]))
    block = data.draw(st.sampled_from([32, 64, 128]))
    rows, width = data.draw(st.integers(1, 40)), 16 * data.draw(st.sampled_from([1, 5, 32, 40, 96]))
    processors = data.draw(st.integers(1, 4))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scale = np.float32(10.0 ** data.draw(st.sampled_from([-3, 0, 4, 12])))
    form = data.draw(st.sampled_from(["plain", "norm", "branch"]))
    x = random.standard_normal(width).astype(np.float32) * scale
    packed, weights = quantized(random, rows, width, bits, block)
    product = Product(
        rows, width, bits, block, region("w", "uint8", packed[0]), region("s", "float32", packed[1])
    )
    arrays, options = dict(w=packed[0], s=packed[1], x=x), dict[str, Any]()
    hidden = x.astype(np.float64)
    bench = Bench(product, compiled, processors)
    if form != "plain":
        arrays["norm"] = random.uniform(0.5, 2, width).astype(np.float32)
    if form == "branch":
        branch = random.standard_normal(width).astype(np.float32)
        held = [bench.device.array(branch), bench.device.array(arrays["norm"])]
        options["branch"] = Branch(held[0].pointer, held[1].pointer, 1e-6, 0.5)
        hidden = (
            hidden + branch / np.sqrt(np.mean(branch.astype(np.float64) ** 2) + 1e-6) * arrays["norm"]
        ) * 0.5
    wanted = hidden
    if form == "norm":
        options["norm"] = "norm"
        wanted = hidden / np.sqrt(np.mean(hidden**2) + 1e-6) * arrays["norm"]
    got = bench.run(arrays, plan=Settings, **options)
    want = weights @ wanted
    # Activations are rounded to 11 bits, and four products are added up in so many.
    close = 2**-9 * np.sqrt((weights**2) @ (wanted**2)) + 1e-6 * np.abs(want).max()
    assert (np.abs(got - want) <= 4 * close).all()
    if form == "branch":
        np.testing.assert_allclose(bench.updated.bytes.view(np.float32), hidden, rtol=1e-4, atol=1e-5 * scale)


def quantized(
    random: np.random.Generator, rows: int, width: int, bits: int, block: int
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Packed weights and scales, and what they stand for, (rows, width) float64."""
    whole = -(-width // block) * block
    values = random.standard_normal((rows, whole)).astype(np.float32)
    values[:, width:] = 0
    packed = quantize_rows(values, bits=bits, block=block, method="nearest")
    stands_for = dequantize_rows(packed.packed, packed.scales, bits=bits, width=whole)
    return (packed.packed, packed.scales.astype(np.float32)), stands_for[:, :width].astype(np.float64)


def region(name: str, dtype: Any, array: np.ndarray) -> Region:
    return Region(name, "", 0, dtype, array.shape)


def test_the_first_of_equal_logits_is_picked(compiled: Path) -> None:
    emulator = Emulator(compiled)
    values, rows = np.array([1, 3, 3, -1], np.float32), np.array([0, 9, 4, 7], np.int32)
    for logits, want in ((values, 4), (np.full(4, np.nan, np.float32), 0)):
        held, result = [emulator.array(logits), emulator.array(rows)], emulator.pinned(8)
        arguments = (held[0].pointer, held[1].pointer, np.int32(4), result.pointer)
        launch = Launch("pick", (1, 1, 1), 512, 0, arguments)
        emulator.record((emulator.zeros(8), emulator.pinned(8)), [launch])()
        assert result.bytes.view(np.int64)[0] == want


@pytest.mark.parametrize("arch", ["sm_87", "sm_90", "sm_110"])  # Orin, H100, Thor
def test_they_compile_for_named_gpus(bundle: Path, compiled: Path, arch: str) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core comes with the extra `cuda`")
    session = open_emulated(bundle, compiled)
    names = sorted({launch.kernel for launch in session._own.launches})
    assert len(compile_kernels(SOURCE.read_text(), arch, names).code) > 10_000


def test_a_session_says_why_it_runs_on_the_graph(bundle, monkeypatch, caplog):
    files = read_step(open_bundle(bundle))
    assert files is not None and len(files.plan.layers) > 0
    monkeypatch.setattr(device_module, "kept_folder", lambda: Path("/nowhere"))
    from gemma_edge.runtime import cuda_session

    def none() -> None:
        raise device_module.Unavailable("no GPU at all")

    monkeypatch.setattr(cuda_session, "Gpu", none)
    with caplog.at_level(logging.WARNING):
        assert cuda_session._kernels(open_bundle(bundle), CudaSettings()) is None
    assert "no GPU at all" in caplog.text


def test_what_the_kernels_do_not_know_is_left_to_the_graph(bundle, tmp_path):
    checkpoint = open_checkpoint(bundle.parent / "checkpoint")
    model = read_text_model(bundle.parent / "checkpoint")
    for spoil, reason in ((float_product, "float"), (odd_block, "blocks of 512")):
        graph = ir.load(bundle / "decoder_cuda.onnx")
        spoil(next(node for node in graph.graph if node.op_type == "MatMulNBits"))
        said = write_decode_step(tmp_path, model, graph, checkpoint, "embed_tokens.weight")
        assert said is not None and reason in said
        assert not (tmp_path / DECODE_STEP).exists()


def float_product(node: ir.Node) -> None:
    node.op_type = "FusedMatMul"


def odd_block(node: ir.Node) -> None:
    node.attributes["block_size"] = ir.AttrInt64("block_size", 512)


def test_a_damaged_description_is_an_error(bundle, tmp_path):
    broken = tmp_path / "bundle"
    shutil.copytree(bundle, broken)
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["files"] = {}
    (broken / "manifest.json").write_text(json.dumps(manifest))
    for content in (b"{", b'{"hidden_size": 3}'):
        (broken / DECODE_STEP).write_bytes(content)
        with pytest.raises(BundleError, match=r"decode_step\.json"):
            read_step(open_bundle(broken))
