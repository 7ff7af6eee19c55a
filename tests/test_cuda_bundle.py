"""Bundles for CUDA, without a GPU: the graph is exact in form, float16 costs little, picks are numpy's.

The kernels themselves are checked by `make test-cuda`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import Gemma4ForCausalLM

from gemma_edge.export import bundle as bundle_module
from gemma_edge.export import fused as fused_module
from gemma_edge.export import plan as plan_module
from gemma_edge.export.bundle import Job, prepare, write_bundle
from gemma_edge.export.pickers import pieces_of
from gemma_edge.export.recipes import load_recipe
from gemma_edge.export.source import find_checkpoint
from gemma_edge.runtime import cuda_session
from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.cuda_session import CudaSession, CudaSettings, bounds_up_to
from gemma_edge.runtime.errors import BundleError, ConfigError
from gemma_edge.runtime.profile import load_profile
from gemma_edge.runtime.sampler import Sampler, SamplingParams
from gemma_edge.runtime.sessions import open_session

from .cuda.checks import compare
from .support.tiny_checkpoint import write_tiny_checkpoint

IDS = np.random.default_rng(5).integers(3, 500, 70)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("cuda") / "checkpoint", seed=7)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Callable[[torch.dtype], np.ndarray]:
    def logits(dtype: torch.dtype) -> np.ndarray:
        model = Gemma4ForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        with torch.no_grad():
            return model(torch.tensor(IDS[None]), output_hidden_states=True).logits[0].float().numpy()

    return logits


def export(checkpoint: Path, out: Path, recipe: str = "fp32", **cache: Any) -> Path:
    profile = load_profile("jetson")
    profile = msgspec.structs.replace(
        profile, prefill_chunk=16, kv_cache=msgspec.structs.replace(profile.kv_cache, **cache)
    )
    write_bundle(prepare(Job(find_checkpoint(str(checkpoint)), profile, load_recipe(recipe), 128, out)))
    return out


@pytest.fixture(scope="module")
def session(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> CudaSession:
    return open_on_cpu(export(checkpoint, tmp_path_factory.mktemp("cuda") / "bundle"))


def open_on_cpu(folder: Path) -> CudaSession:
    return CudaSession(open_bundle(folder), threads=1, settings=CudaSettings(device="cpu"))


def run(session: CudaSession) -> dict[int, np.ndarray]:
    found = {}
    for first, size in ((0, 16), (16, 13), (29, 1), (30, 10)):
        session.prefill(IDS[first : first + size], first, last=first == 30)
        found[first + size - 1] = session.logits.copy()
    for position in range(40, len(IDS)):
        session.step(int(IDS[position]), position)
        found[position] = session.logits.copy()
    return found


def test_the_form_is_exact(checkpoint, expected, tmp_path, monkeypatch):
    """In float32 the graph for CUDA gives transformers' logits, also with queries, keys and values in one."""
    monkeypatch.setattr(fused_module, "INNERS", ("float32",))
    for module in (plan_module, bundle_module):
        monkeypatch.setattr(module, "inner_type", lambda profile: torch.float32)
    session = open_on_cpu(export(checkpoint, tmp_path / "wide", dtype="float32"))
    want = expected(torch.float32)
    for position, logits in run(session).items():
        assert np.abs(logits - want[position]).max() < 1e-3


def test_float16_costs_no_more_than_in_transformers(session, expected):
    found, want, half = run(session), expected(torch.float32), expected(torch.float16)
    positions = sorted(found)
    error = np.array([found[position] - want[position] for position in positions])
    allowed = (half - want)[positions]
    assert np.sqrt(np.mean(error**2)) < np.sqrt(np.mean(allowed**2))


def test_a_chunk_is_run_in_pieces_where_scores_would_be_large(session, monkeypatch):
    session.prefill(IDS[:16], 0, last=True)
    whole = session.logits.copy()
    monkeypatch.setattr(cuda_session, "pieces", lambda rows, position, heads: [(0, 5), (5, rows - 5)])
    session.prefill(IDS[:16], 0, last=True)
    assert np.abs(session.logits - whole).max() < 0.05 * whole.std()


def test_what_has_no_bound_is_float32(session):
    graph = ir.load(session_path(session)).graph
    types = {value.name: value.dtype for value in graph.initializers.values()}
    assert types["constants.qkv_norm_0"] == ir.DataType.FLOAT16
    assert types["layers.0.post_feedforward_layernorm.weight"] == ir.DataType.FLOAT
    assert {value.dtype for value in graph.inputs if value.name.startswith("past")} == {ir.DataType.FLOAT16}
    assert {value.dtype for value in graph.outputs if value.name == "logits"} == {ir.DataType.FLOAT}
    allowed = {"Shape", "Gather", "If", "Loop", "Range", "Where"}
    assert not allowed & {node.op_type for node in graph}, "nodes that ONNX Runtime keeps on the CPU"


def session_path(session: CudaSession) -> str:
    return session.decoder._model_path


def test_picks_are_numpys(session):
    session.prefill(IDS[:16], 0, last=True)
    logits = session.logits.copy()
    assert session.best() == logits.argmax()
    ids, scores = session.top()
    assert np.array_equal(scores, logits[ids]) and (np.diff(ids) > 0).all()
    assert set(ids) == set(np.argsort(-logits, kind="stable")[: len(ids)])


@pytest.mark.parametrize(
    "settings", [dict(), dict(temperature=1.0, top_k=40, top_p=0.9, seed=3), dict(temperature=2.0, seed=3)]
)
def test_the_sampler_picks_the_same_from_either(session, settings):
    session.prefill(IDS[:16], 0, last=True)
    params = SamplingParams(**settings)
    there, here = (Sampler(params, [], 512) for _ in range(2))
    for _ in range(20):
        assert there.pick_from(session) == here.pick(session.logits.copy())


def test_bounds():
    assert bounds_up_to(512) == (512,)
    assert bounds_up_to(1024) == (1024,)
    assert bounds_up_to(5000) == (1024, 2048, 4096, 5000)
    assert pieces_of(262_144) == 512 and pieces_of(257) == 1


def test_a_bundle_for_cuda_is_refused_without_cuda(session, tmp_path):
    folder = Path(session_path(session)).parent
    with pytest.raises(BundleError, match="made for CUDAExecutionProvider"):
        open_session(open_bundle(folder))
    with pytest.raises(ValueError, match="no guesses on CUDA"):
        session.step(5, 3, [1])


def test_caches_must_be_float16(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="expected float16"):
        export(checkpoint, tmp_path / "bundle", dtype="int8")


def halves(expected) -> dict[str, Any]:
    """What `cuda.cases` stores, but for runs with moved weights."""
    want, half = expected(torch.float32), expected(torch.float16)
    errors = np.sqrt(np.mean((half - want) ** 2, axis=1))
    flips = (half.argmax(1) != want.argmax(1)).mean()
    return dict(logits=want, half_error=np.sqrt(np.mean(errors**2)), half_errors=errors, half_flips=flips)


def test_the_yardstick_passes_this_graph_and_no_other(session, expected, tmp_path):
    """A window of half the width and caches that are another layer's must not pass as float16's errors."""
    reference = halves(expected)
    compare(run(session), reference)
    for spoil in (narrow_window, other_caches):
        folder = tmp_path / spoil.__name__
        shutil.copytree(Path(session_path(session)).parent, folder)
        graph = ir.load(folder / "decoder_cuda.onnx")
        spoil([node for node in graph.graph if node.op_type == "GroupQueryAttention"])
        ir.save(graph, folder / "decoder_cuda.onnx")
        with pytest.raises(AssertionError, match=r"largest logit|error"):
            compare(run(open_on_cpu(folder)), reference)


def narrow_window(attentions: list[ir.Node]) -> None:
    for node in attentions:
        window = node.attributes["local_window_size"].as_int()
        if window > 0 and "sliding_window_cache" not in node.attributes:
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window // 2)


def other_caches(attentions: list[ir.Node]) -> None:
    """Readers of one cache take keys as values and values as keys."""
    for node in attentions:
        if "sliding_window_cache" not in node.attributes and len(node.outputs) == 1:
            keys, values = node.inputs[3], node.inputs[4]
            node.replace_input_with(3, values)
            node.replace_input_with(4, keys)
