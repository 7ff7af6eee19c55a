"""The session: logits against transformers, buffers bound once, written in place, damaged bundles refused."""

from __future__ import annotations

import dataclasses
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from gemma_edge.runtime.bundle import Bundle
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.machine import usable_cpus
from gemma_edge.runtime.session import Session

from .support.tiny_bundles import TinyBundle

CHUNK, CONTEXT = 16, 192


@pytest.fixture(scope="module")
def tiny(tiny_bundle) -> TinyBundle:
    return tiny_bundle(context=CONTEXT, chunk=CHUNK)


@pytest.fixture(scope="module")
def session(tiny: TinyBundle) -> Session:
    return Session(tiny.bundle)


@pytest.fixture(scope="module")
def reference(tiny: TinyBundle) -> Callable[[np.ndarray], np.ndarray]:
    """transformers' logits of every position, (length, vocab)."""
    torch.set_num_threads(1)  # so small a model only waits for threads
    model = tiny.reference()

    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(ids)[None]).logits[0].numpy()

    return logits


def ids_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(23, 512, length)


def prefill(session: Session, ids: np.ndarray) -> None:
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        session.prefill(part, start, last=start + len(part) == len(ids))


@pytest.mark.parametrize("length", [1, 7, 16, 45])
def test_logits_after_prefill_and_across_the_window(session: Session, reference, length: int):
    ids = ids_of(length + 64, seed=length)
    logits = reference(ids)
    prefill(session, ids[:length])
    assert np.abs(session.logits - logits[length - 1]).max() < 1e-3
    for position in range(length, length + 64):
        session.step(int(ids[position]), position)
        assert np.abs(session.logits - logits[position]).max() < 1e-3


def test_logits_are_a_view_of_one_buffer(session: Session):
    prefill(session, ids_of(20))
    address = session.logits.ctypes.data
    session.step(30, 20)
    assert session.logits.shape == (512,)
    assert session.logits.ctypes.data == address


def test_a_chunk_that_is_not_the_last_leaves_the_logits_alone(session: Session):
    session.decoder.logits[...] = 7
    session.prefill(ids_of(CHUNK), 0, last=False)
    assert (session.decoder.logits == 7).all()


def test_caches_are_updated_in_place(session: Session, tiny: TinyBundle):
    """What the graph wrote is in the very arrays that were bound: nothing was copied or swapped."""
    arrays = {name: value.numpy() for name, value in session.caches.values.items()}
    addresses = {name: value.data_ptr() for name, value in session.caches.values.items()}
    for array in arrays.values():
        array[...] = 0
    prefill(session, ids_of(20))
    session.step(30, 20)
    assert {name: value.data_ptr() for name, value in session.caches.values.items()} == addresses
    for layer in tiny.bundle.manifest.caches.layers:
        keys = session.caches.values[f"{layer.index}.key"].numpy()
        assert keys.shape == (1, layer.kv_heads, layer.capacity, layer.head_dim)
        if layer.layer_type == "full_attention":
            assert (np.abs(keys[0, 0, :21]).sum(-1) > 0).all()
            assert (keys[0, 0, 21:] == 0).all()


def test_caches_take_what_the_manifest_says(session: Session, tiny: TinyBundle):
    caches = tiny.bundle.manifest.caches
    assert sum(v.tensor_size_in_bytes() for v in session.caches.values.values()) == caches.size_bytes
    assert session.caches.context == caches.context == CONTEXT


def test_a_step_allocates_next_to_nothing_in_python(session: Session):
    prefill(session, ids_of(5))
    for position in range(5, 15):
        session.step(30, position)
    tracemalloc.start()
    for position in range(15, 115):
        session.step(30, position)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16_384  # logits alone are 2 KiB; anything kept or copied a step would add up
    assert left < 8_192


def with_manifest(bundle: Bundle, **caches) -> Bundle:
    manifest = bundle.manifest
    changed = msgspec.structs.replace(manifest, caches=msgspec.structs.replace(manifest.caches, **caches))
    return dataclasses.replace(bundle, manifest=changed)


def test_a_graph_with_other_caches_than_the_manifest_is_refused(tiny: TinyBundle):
    bundle = tiny.bundle
    fewer = with_manifest(bundle, layers=bundle.manifest.caches.layers[:-1])
    with pytest.raises(BundleError, match="caches"):
        Session(fewer)


def test_no_more_threads_than_cpus(tiny: TinyBundle):
    runtime = msgspec.structs.replace(tiny.bundle.manifest.runtime, threads=10_000)
    manifest = msgspec.structs.replace(tiny.bundle.manifest, runtime=runtime)
    assert Session(dataclasses.replace(tiny.bundle, manifest=manifest)).threads == usable_cpus()
    assert Session(tiny.bundle, threads=3).threads == 3


def test_a_damaged_graph_is_a_bundle_error(tiny: TinyBundle, tmp_path: Path):
    bundle = tiny.bundle
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    (folder / "decoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"decoder\.onnx"):
        Session(dataclasses.replace(bundle, path=folder))


def test_a_provider_that_is_not_there_is_named(tiny: TinyBundle):
    bundle = tiny.bundle
    runtime = msgspec.structs.replace(bundle.manifest.runtime, execution_provider="cuda")
    manifest = msgspec.structs.replace(bundle.manifest, runtime=runtime)
    with pytest.raises(BundleError, match="CUDAExecutionProvider"):
        Session(dataclasses.replace(bundle, manifest=manifest))
