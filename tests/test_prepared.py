"""Packed weights: the same numbers as without, used only where they fit, whole or not there, optional."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace as replace_fields

from gemma_edge.cli import main
from gemma_edge.runtime import prepared, residency, start
from gemma_edge.runtime.audio.encoder import AudioEncoder
from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.errors import GemmaEdgeError
from gemma_edge.runtime.machine import Machine
from gemma_edge.runtime.prepared import DESCRIPTION, PrepareError, make, misfit
from gemma_edge.runtime.session import Session
from gemma_edge.runtime.stats import memory_use

from .support.tiny_audio import TINY
from .support.tiny_bundles import TinyBundle
from .test_prefix import CHUNK, CONTEXT, MARK, answer, ids_of, open_engine, reused

EARS = dict(audio=TINY, num_hidden_layers=1, layer_types=["full_attention"], num_kv_shared_layers=0)
LOGGER = "gemma_edge.runtime.start"


@pytest.fixture(scope="module")
def nano(nano_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The nano bundle with packed weights."""
    bundle = open_bundle(nano_bundle)
    folder = tmp_path_factory.mktemp("packed") / "prepared"
    make(bundle, folder)
    assert misfit(bundle, folder) is None
    return dataclasses.replace(bundle, prepared=folder)


def plain(bundle: Bundle) -> Bundle:
    return dataclasses.replace(bundle, prepared=None)


def logits(bundle: Bundle, tokens: int = 45) -> np.ndarray:
    """Of a prompt in chunks and of steps after it, with and without guesses: (runs, vocab)"""
    session, ids = Session(bundle, longest_draft=2), np.asarray(ids_of(tokens), np.int64)
    rows = []
    for first in range(0, tokens, session.chunk):
        chunk = ids[first : first + session.chunk]
        session.prefill(chunk, first, last=first + len(chunk) == tokens)
    rows.append(session.logits.copy())
    for offset in range(4):
        session.step(7 + offset, tokens + offset)
        rows.append(session.logits.copy())
    session.step(9, tokens + 4, [10, 11])
    return np.stack([*rows, *(session.logits_after(count).copy() for count in range(3))])


def test_nano_says_the_same_to_the_last_bit(nano: Bundle):
    assert nano.decoder.parent == nano.prepared and nano.embeddings.parent == nano.path
    np.testing.assert_array_equal(logits(nano), logits(plain(nano)))


def test_8_bit_caches(tiny_bundle, tmp_path: Path):
    bundle = tiny_bundle(context=192, chunk=16, kv="int8").bundle
    make(bundle, tmp_path / "packed")
    packed = dataclasses.replace(bundle, prepared=tmp_path / "packed")
    np.testing.assert_array_equal(logits(packed), logits(bundle))


def test_both_graphs_of_a_bundle_with_a_prefill_graph(
    tiny_bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """They load at the same time: the same numbers, and damage of what loads beside the decoder is found."""
    bundle = tiny_bundle(context=192, chunk=16, prefill="int8").bundle
    folder = tmp_path / "packed"
    make(bundle, folder)
    given = arguments("--prepared", str(folder))
    session = start.load_prepared(bundle, given, lambda ready: Session(ready, longest_draft=2))
    assert session.prompts is not None and not caplog.text
    expected = logits(bundle)
    np.testing.assert_array_equal(logits(dataclasses.replace(bundle, prepared=folder)), expected)
    damage(folder / "prefill.onnx")
    loaded = start.load_prepared(bundle, given, lambda ready: (ready, Session(ready))[0])
    assert loaded.prepared is None and "prefill.onnx: onnxruntime cannot load it" in caplog.text


def test_the_audio_encoder_is_packed_too(tiny_bundle, tmp_path: Path):
    bundle = tiny_bundle(model=EARS).bundle
    make(bundle, tmp_path / "packed")
    packed = dataclasses.replace(bundle, prepared=tmp_path / "packed")
    assert packed.audio_encoder_stream.parent == packed.prepared
    sound = np.random.default_rng(0).standard_normal(24_000).astype(np.float32) * 0.1
    rate = bundle.manifest.audio.mel.sampling_rate
    expected = AudioEncoder(bundle, threads=1).encode(sound, rate)
    np.testing.assert_array_equal(AudioEncoder(packed, threads=1).encode(sound, rate), expected)


def test_snapshots_of_a_prompt_fit_with_and_without(tiny_bundle, tmp_path: Path):
    tiny = tiny_bundle(context=CONTEXT, chunk=CHUNK)
    system = [*ids_of(60), MARK]
    expected = answer(open_engine(tiny, folder=tmp_path / "kv"), [*system, 40, 41])
    make(tiny.bundle, tmp_path / "packed")
    packed = dataclasses.replace(tiny.bundle, prepared=tmp_path / "packed")
    engine = open_engine(TinyBundle(packed, tiny.checkpoint), folder=tmp_path / "kv")
    assert answer(engine, [*system, 40, 41]) == expected
    assert reused(engine) == len(system)


HERE = Machine("Linux", "aarch64", cpus=("0x41:0xd0b",), cpu_features=frozenset({"asimd", "asimddp"}))


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (dataclasses.replace(HERE, cpu_features=frozenset({"asimd"})), "differs in asimddp"),
        (dataclasses.replace(HERE, cpus=("0x41:0xd08",)), "0xd08, this is 0x41:0xd0b"),
        (dataclasses.replace(HERE, machine="x86_64"), "made for machine x86_64, this is aarch64"),
    ],
)
def test_another_machine_s_do_not_fit(nano: Bundle, tmp_path: Path, there: Machine, named: str):
    described(nano, tmp_path, key=prepared.key_of(nano, there))
    why_not = misfit(nano, tmp_path, HERE)
    assert why_not is not None and named in why_not
    assert misfit(nano, tmp_path, there) is None


def described(bundle: Bundle, folder: Path, **changes: Any) -> None:
    """`folder` with links to packed weights and a description of its own."""
    assert bundle.prepared is not None
    for path in bundle.prepared.iterdir():
        if path.name != DESCRIPTION:
            (folder / path.name).symlink_to(path)
    made = msgspec.json.decode((bundle.prepared / DESCRIPTION).read_bytes(), type=prepared.Description)
    made = replace_fields(made, **changes)
    (folder / DESCRIPTION).write_bytes(msgspec.json.encode(made))


def test_what_else_does_not_fit(nano: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "no packed weights" in str(misfit(nano, tmp_path))
    described(nano, tmp_path)
    assert misfit(nano, tmp_path) is None
    with monkeypatch.context() as later:
        later.setattr(prepared.ort, "__version__", "9.9.9")
        assert "made for onnxruntime 1." in str(misfit(nano, tmp_path))
    (tmp_path / "decoder.onnx.data").unlink()
    assert "None bytes, expected" in str(misfit(nano, tmp_path))
    for text, named in (
        ("{", "not valid JSON"),
        ('{"format_version": 1}', "key"),
        (
            json.dumps(json.loads((nano.prepared / DESCRIPTION).read_text()) | {"format_version": 2}),
            "format 2",
        ),
    ):
        (tmp_path / DESCRIPTION).write_text(text)
        assert named in str(misfit(nano, tmp_path))


def test_a_bundle_that_was_exported_again_needs_new_ones(nano: Bundle, tmp_path: Path):
    other = tmp_path / "bundle"
    other.mkdir()
    for path in nano.path.iterdir():
        if path.name != "manifest.json":
            (other / path.name).symlink_to(path)
    text = (nano.path / "manifest.json").read_text()
    (other / "manifest.json").write_text(text.replace('"created": "20', '"created": "19'))
    assert "manifest_sha256" in str(misfit(open_bundle(other), nano.prepared))


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    start.add_start_arguments(parser)
    return parser.parse_args(given)


@pytest.fixture
def own(nano: Bundle, tmp_path: Path) -> Bundle:
    """The nano bundle under a folder of the test's own."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in nano.path.iterdir():
        (folder / path.name).symlink_to(path)
    return open_bundle(folder)


def used(bundle: Bundle, *given: str) -> Path | None:
    return start.load_prepared(bundle, arguments(*given), lambda ready: ready).prepared


def test_when_they_are_made_and_used(own: Bundle, capsys: pytest.CaptureFixture[str]):
    assert used(own) is None and not (own.path / "prepared").exists()
    folder = used(own, "--prepare", "first-start")
    assert folder == own.path / "prepared" and "packing weights" in capsys.readouterr().err
    made = (folder / DESCRIPTION).stat().st_ino
    assert used(own, "--prepare", "first-start") == used(own) == folder
    assert (folder / DESCRIPTION).stat().st_ino == made and not capsys.readouterr().err
    assert used(own, "--prepare", "off") is None
    profile = dataclasses.replace(
        own,
        manifest=replace_fields(
            own.manifest,
            runtime=replace_fields(own.manifest.runtime, prepare="first-start"),
        ),
    )
    (folder / "decoder.onnx").unlink()
    assert used(profile) == folder  # made anew
    assert logits(dataclasses.replace(own, prepared=folder)).any()


def test_stale_ones_are_left_alone_and_named(own: Bundle, caplog: pytest.LogCaptureFixture):
    make(own, own.path / "prepared")
    (own.path / "prepared" / "decoder.onnx").unlink()
    with caplog.at_level(logging.WARNING, LOGGER):
        assert used(own) is None
    assert "gemma-edge prepare" in caplog.text


def test_damage_is_found_and_the_bundle_s_own_weights_are_loaded(
    own: Bundle, caplog: pytest.LogCaptureFixture
):
    folder = own.path / "prepared"
    make(own, folder)
    damage(folder / "decoder.onnx")
    assert misfit(own, folder) is None  # nobody reads gigabytes at every start to find out
    assert "decoder.onnx.data: damaged" in str(misfit(own, folder, verify_hashes=True))
    with caplog.at_level(logging.WARNING, LOGGER):
        session = start.load_prepared(own, arguments(), lambda ready: Session(ready, threads=1))
    assert "not usable" in caplog.text and "--force" in caplog.text
    session.prefill(np.asarray([2, 5, 6]), 0, last=True)
    assert np.isfinite(session.logits).all()


def damage(graph: Path) -> None:
    """In the middle of one of its packed weights."""
    packed = re.findall(rb"MatMul\w+\+\d+\|(\d+);(\d+)", graph.read_bytes())
    offset, length = map(int, packed[len(packed) // 2])
    with graph.with_name(f"{graph.name}.data").open("r+b") as file:
        file.seek(offset + length // 2)
        file.write(b"damage")


def test_the_command(own: Bundle, capsys: pytest.CaptureFixture[str]):
    bundle = str(own.path)
    assert main(["prepare", bundle, "--check"]) == 1
    assert main(["prepare", bundle]) == 0
    assert "MiB in" in capsys.readouterr().out
    assert main(["prepare", bundle, "--check"]) == 0
    assert main(["prepare", bundle]) == 0
    assert "fits this machine" in capsys.readouterr().out
    assert main(["prepare", bundle, "--force"]) == 0
    assert sorted(path.name for path in own.path.glob("prepared*")) == ["prepared"]
    assert main(["ask", bundle, "Hello", "--max-tokens", "2", "--residency", "prefault"]) == 0
    assert main(["prepare", bundle, "--prepared", str(own.path)]) == 1
    assert "holds no packed weights" in capsys.readouterr().err


def test_cuda_packs_nothing(own: Bundle, tmp_path: Path):
    runtime = replace_fields(own.manifest.runtime, execution_provider="cuda")
    manifest = replace_fields(own.manifest, runtime=runtime, audio=None)
    with pytest.raises(PrepareError, match="nothing to prepare"):
        make(dataclasses.replace(own, manifest=manifest), tmp_path / "packed")


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files may grow to 100 kB: what a full disk does to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing(own: Bundle, tmp_path: Path, small_files):
    with pytest.raises(PrepareError, match="nothing of it is kept"):
        make(own, tmp_path / "packed")
    assert not list(tmp_path.glob("packed*"))


def test_too_little_room_is_said_before_the_work(own: Bundle, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda place: argparse.Namespace(free=1 << 20))
    with pytest.raises(PrepareError, match="the disk has 1 MiB left"):
        make(own, tmp_path / "packed")


@pytest.mark.parametrize("when", ["while it starts", "while it packs"])
def test_ctrl_c_ends_the_packing_and_leaves_nothing(when: str, own: Bundle, tmp_path: Path, monkeypatch):
    slow = tmp_path / "python"
    slow.write_text('#!/bin/sh\necho half > "$4/decoder.onnx"\nexec sleep 60\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    children: list[subprocess.Popen] = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            children.append(self)
            if when == "while it starts":
                signal.raise_signal(signal.SIGINT)

        def communicate(self, *arguments, **options):
            if when == "while it packs" and self.returncode is None and not self.told:
                self.told = True
                signal.raise_signal(signal.SIGINT)
            return super().communicate(*arguments, **options)

        told = False

    monkeypatch.setattr(prepared.subprocess, "Popen", Interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            make(own, tmp_path / "packed")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not list(tmp_path.glob("packed*"))
    assert [child.returncode for child in children] == [-signal.SIGKILL]


def test_two_at_once_do_not_mix(own: Bundle, tmp_path: Path):
    with (
        prepared.written_aside(tmp_path / "packed", PrepareError),
        pytest.raises(PrepareError, match="another process is writing"),
    ):
        make(own, tmp_path / "packed")


def test_pages_are_read_in_and_locked_without_a_copy(nano: Bundle):
    assert nano.prepared is not None
    session = Session(nano, threads=1)
    size_bytes = sum(length for _, length in residency.mapped(nano.prepared))
    assert size_bytes > 3e6
    assert residency.keep(nano.prepared, "map") == 0
    before = memory_use().anonymous_bytes
    for policy in ("prefault", "lock"):
        assert residency.keep(nano.prepared, policy) == size_bytes
    locked_bytes = 1024 * int(status("VmLck"))
    assert locked_bytes == size_bytes or resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < size_bytes
    assert memory_use().anonymous_bytes - before < size_bytes / 4
    session.step(5, 0)


def status(name: str) -> str:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return lines[name].split()[0]


def test_what_the_system_refuses_is_said(nano: Bundle, caplog: pytest.LogCaptureFixture, monkeypatch):
    def refuse(ranges, call):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(residency, "_each", refuse)
    with caplog.at_level(logging.INFO, "gemma_edge.runtime.residency"):
        residency.keep(nano.prepared, "lock")
    assert "ulimit -l" in caplog.text and "page cache only" in caplog.text


def test_residency_without_packed_weights_is_said(own: Bundle, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, LOGGER):
        used(own, "--residency", "lock")
    assert "needs packed weights" in caplog.text
    assert issubclass(PrepareError, GemmaEdgeError)
