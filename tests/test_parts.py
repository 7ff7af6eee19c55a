"""The decoder in parts: what the whole does to the last bit, packed too; refused when a part is amiss."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gemma_edge.export import parts
from gemma_edge.export.bundle import write_bundle
from gemma_edge.export.geometry import read_text_model
from gemma_edge.export.parts import WORTH_BYTES, write_parts
from gemma_edge.runtime import decoder, huge_pages, read_ahead
from gemma_edge.runtime.bundle import READ, Bundle, open_bundle
from gemma_edge.runtime.drafter import open_drafter
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.graphs import data_of
from gemma_edge.runtime.prepared import make, misfit
from gemma_edge.runtime.session import Session

from .support.onnx_graphs import load_graph
from .support.tiny_bundles import export_tiny, prepare_tiny, tiny_profile
from .support.tiny_checkpoint import write_tiny_checkpoint
from .support.tiny_drafter import CENTROIDS, write_tiny_drafter
from .test_drafter import MODEL
from .test_mapped_pages import pages_of
from .test_parity import SHAPES

CHUNK, GUESSES = 16, 2
NAMES = [*parts.NAMES]
KINDS: dict[str, dict[str, Any]] = {
    "float": {},
    "4 bits": dict(recipe="int4"),
    "4 bits, int8 caches": dict(recipe="int4", kv="int8"),
    "prefill graph": dict(recipe="int4", prefill="int8"),
}


def whole(bundle: Bundle) -> Bundle:
    """The same bundle on decoder.onnx."""
    return dataclasses.replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, decoder_parts=()))


def told(bundle: Bundle, length: int = 53) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of a prompt longer than the window, of steps and guesses after it; the caches in the end."""
    session = Session(bundle, threads=1, longest_draft=GUESSES)
    ids = np.random.default_rng(length).integers(23, 500, length + 12)
    rows = []
    for start in range(0, length, CHUNK):
        chunk = ids[start : min(start + CHUNK, length)]
        session.prefill(chunk, start, last=start + len(chunk) == length)
    rows.append(session.logits.copy())
    position = length
    for drafted in (0, 0, 1, 2, 0):
        drafted = min(drafted, session.caches.ahead(position + 1))
        session.step(int(ids[position]), position, [7, 8][:drafted])  # and takes the guesses back
        rows += [session.logits_after(count).copy() for count in range(1 + drafted)]
        position += 1
    return np.stack(rows), session.caches.copy(position)


def assert_same(one: Bundle, other: Bundle) -> None:
    (logits, caches), (expected, held) = told(one), told(other)
    np.testing.assert_array_equal(logits, expected)
    for name, rows in held.items():
        np.testing.assert_array_equal(caches[name], rows, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_says_the_same(tiny_bundle, shape: str):
    config, slack = SHAPES[shape]
    bundle = tiny_bundle(model=dict(seed=7, **config), slack=slack, chunk=CHUNK, parts=True).bundle
    assert [graph.name for graph in bundle.decoder_graphs] == NAMES
    assert_same(bundle, whole(bundle))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_the_same_packed_too(tiny_bundle, tmp_path: Path, kind: str):
    bundle = tiny_bundle(model=dict(seed=3), slack=4, chunk=CHUNK, parts=True, **KINDS[kind]).bundle
    assert_same(bundle, whole(bundle))
    make(bundle, tmp_path / "packed")
    packed = dataclasses.replace(bundle, prepared=tmp_path / "packed")
    assert {graph.parent for graph in packed.decoder_graphs} == {tmp_path / "packed"}
    assert not (tmp_path / "packed" / "decoder.onnx").exists()
    assert_same(packed, bundle)
    (tmp_path / "packed" / NAMES[1]).unlink()
    assert NAMES[1] in str(misfit(bundle, tmp_path / "packed"))


def test_int8_caches_are_read_by_the_part_that_reads_them(tiny_bundle):
    """Bound where they are, or each reader would copy a whole buffer in every step."""
    bundle = tiny_bundle(model=dict(seed=3), slack=4, chunk=CHUNK, parts=True, **KINDS["4 bits, int8 caches"])
    lower, upper, head = Session(bundle.bundle, threads=1).decoder.parts
    counts = [sum(name.startswith(READ) for name in part.outputs) for part in (lower, upper, head)]
    readers = bundle.bundle.manifest.geometry.num_kv_shared_layers + 1  # and the last that owns a cache
    assert counts == [0, 2 * readers, 0]


def test_what_is_cut_out_of_a_cache_is_cut_once(tiny_bundle):
    """In the part that reads: at depth 1,024 it is 4 MB, and more with every token."""
    folder = tiny_bundle(model=dict(seed=3), slack=4, chunk=CHUNK, parts=True).path
    whole_graph, *operators = (
        [node.op_type for node in load_graph(folder / name).model.graph.node]
        for name in ("decoder.onnx", *NAMES)
    )
    for name in (
        "Softmax",
        "MatMul",
        "FusedMatMul",
        "GroupQueryAttention",
        "RotaryEmbedding",
        "TensorScatter",
    ):
        assert sum(part.count(name) for part in operators) == whole_graph.count(name), name
    assert "Softmax" not in operators[0] and "GroupQueryAttention" not in operators[1]


def test_an_answer_is_the_same(tiny_bundle):
    bundle = tiny_bundle(model=dict(seed=3), slack=4, chunk=CHUNK, parts=True).bundle
    prompt = np.random.default_rng(1).integers(23, 500, 40).tolist()
    answers = [list(Engine(one).generate(prompt, max_new_tokens=40)) for one in (bundle, whole(bundle))]
    assert answers[0] == answers[1] and len(answers[0]) > 1


def test_a_drafter_gets_the_same_states(tmp_path: Path):
    drafter = write_tiny_drafter(tmp_path / "drafter", **CENTROIDS)
    bundle = export_tiny(tmp_path, model=MODEL, drafter=drafter, slack=4, chunk=CHUNK, parts=True).bundle
    guessed = []
    for one in (bundle, whole(bundle)):
        session = Session(one, threads=1)
        session.prefill(np.arange(30, 46), 0, last=True)
        guessing = open_drafter(one, session)
        assert guessing is not None
        states = session.states_after(0).copy()
        guesses = guessing.guesses(7, 16, states)
        guessed.append((states, [next(guesses) for _ in range(3)]))
    np.testing.assert_array_equal(guessed[0][0], guessed[1][0])
    assert guessed[0][1] == guessed[1][1]


def test_rows_without_logits_run_the_lower_part_alone(tiny_bundle):
    session = Session(tiny_bundle(model=dict(seed=3), slack=4, chunk=CHUNK, parts=True).bundle, threads=1)
    ran: list[str] = []
    for part, name in zip(session.decoder.parts, NAMES, strict=True):
        object.__setattr__(part, "session", Watched(part.session, name, ran))
    session.prefill(np.arange(30, 30 + CHUNK), 0, last=False)
    assert ran == NAMES[:1]
    session.step(7, CHUNK)
    assert ran == [NAMES[0], *NAMES]


class Watched:
    """A session that notes its name when it runs."""

    def __init__(self, session: Any, name: str, ran: list[str]) -> None:
        self._session, self._name, self._ran = session, name, ran

    def run_with_iobinding(self, *args: Any) -> None:
        self._ran.append(self._name)
        self._session.run_with_iobinding(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def test_the_largest_is_loaded_first_and_read_ahead_once(tiny_bundle, monkeypatch: pytest.MonkeyPatch):
    bundle = tiny_bundle(
        model=dict(seed=3), slack=4, chunk=CHUNK, parts=True, recipe="int4", prefill="int8"
    ).bundle
    sizes = {part.file: part.weights_bytes for part in bundle.manifest.decoder_parts}
    sizes["prefill.onnx"] = bundle.manifest.prefill.weights_bytes
    opened, read, open_graph = list[str](), list[str](), decoder.open_graph
    monkeypatch.setattr(decoder, "usable_cpus", lambda: 1)  # one after the other
    monkeypatch.setattr(
        decoder, "open_graph", lambda path, *rest: (opened.append(path.name), open_graph(path, *rest))[1]
    )
    monkeypatch.setattr(read_ahead, "_read", lambda weights, ended: read.append(weights.name))
    Session(bundle, threads=1)
    assert opened == sorted(sizes, key=lambda name: -sizes[name])
    assert read == ["decoder.onnx.data", "prefill.onnx.data"]


def test_pages_of_packed_parts_are_given_back(tiny_bundle, tmp_path: Path):
    bundle = tiny_bundle(model=dict(seed=3), slack=4, chunk=CHUNK, parts=True, recipe="int4").bundle
    make(bundle, tmp_path / "packed")
    session = Session(dataclasses.replace(bundle, prepared=tmp_path / "packed"), threads=1)
    files = [data_of(tmp_path / "packed" / name) for name in NAMES]
    session.prefill(np.arange(30, 40), 0, last=True)
    before = session.logits.copy()
    assert all(pages_of(file, "Rss") > 0 for file in files)
    session._decoder_pages.give_back()
    assert [pages_of(file, "Rss") for file in files] == [0, 0, 0]
    session.prefill(np.arange(30, 40), 0, last=True)
    np.testing.assert_array_equal(session.logits, before)


def test_packed_weights_are_not_moved(tiny_bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They are mapped; the thread that looks for memory to move takes 0.2 s from the first prompt."""
    bundle, begun = tiny_bundle(model=dict(seed=3), slack=4, chunk=CHUNK, parts=True).bundle, list[int]()
    make(bundle, tmp_path / "packed")
    monkeypatch.setattr(huge_pages, "start", begun.append)
    for one in (bundle, dataclasses.replace(bundle, prepared=tmp_path / "packed")):
        Session(one, threads=1)
    assert begun == [bundle.manifest.memory.weights_bytes, 0]


def test_small_models_and_cuda_have_none(tmp_path: Path):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", seed=3)
    small = prepare_tiny(checkpoint, tmp_path / "small")
    assert small.job.parts_from_bytes == WORTH_BYTES
    assert not write_bundle(small).decoder_parts
    wanted = prepare_tiny(checkpoint, tmp_path / "cuda", parts=True, kv="float16", slack=0)
    device = msgspec.structs.replace(tiny_profile(kv="float16", slack=0), execution_provider="cuda")
    on_cuda = dataclasses.replace(wanted, job=dataclasses.replace(wanted.job, profile=device))
    assert not write_bundle(on_cuda).decoder_parts
    assert not [path for out in ("small", "cuda") for path in (tmp_path / out).glob("decoder_[luh]*.onnx")]


def test_a_part_that_is_missing_or_damaged_is_named(tiny_bundle, tmp_path: Path):
    bundle = tiny_bundle(model=dict(seed=3), slack=4, chunk=CHUNK, parts=True)
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    (folder / NAMES[2]).write_bytes(b"x" * (folder / NAMES[2]).stat().st_size)
    with pytest.raises(BundleError, match=r"decoder_head\.onnx: onnxruntime cannot load it"):
        Session(open_bundle(folder), threads=1)
    (folder / NAMES[2]).unlink()
    with pytest.raises(BundleError, match=r"decoder_head\.onnx is missing"):
        open_bundle(folder)


def test_sizes_are_those_of_the_weights(tiny_bundle, tmp_path: Path):
    """Together what the decoder multiplies with; in the file that the manifest says."""
    bundle = tiny_bundle(model=dict(seed=3), slack=4, chunk=CHUNK, parts=True, recipe="int4")
    listed = bundle.bundle.manifest.decoder_parts
    total = sum(part.weights_bytes for part in listed)
    for name in ("decoder.onnx", "decoder.onnx.data", "embeddings.onnx.data"):
        (tmp_path / name).symlink_to(bundle.path / name)
    model = read_text_model(bundle.checkpoint)
    assert write_parts(tmp_path, model, worth_bytes=total) == listed
    for name in NAMES:  # byte by byte what another process wrote before
        assert (tmp_path / name).read_bytes() == (bundle.path / name).read_bytes()
    assert write_parts(tmp_path, model, worth_bytes=total + 1) == ()
