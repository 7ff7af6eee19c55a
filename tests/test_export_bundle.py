"""An export as a whole: what is written, that a failed one leaves nothing, budgets, the command line."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gemma_edge.cli import main
from gemma_edge.export import bundle as export_bundle
from gemma_edge.export.bundle import ExportError, write_bundle
from gemma_edge.export.geometry import parse_text_model
from gemma_edge.export.plan import BudgetError, make_plan, total_bytes
from gemma_edge.export.recipes import load_recipe
from gemma_edge.export.source import SourceError, find_checkpoint
from gemma_edge.export.token_table import TokenizerError
from gemma_edge.runtime.bundle import open_bundle, sha256_file
from gemma_edge.runtime.profile import DeviceProfile

from .support.tiny_bundles import prepare_tiny, tiny_profile
from .support.tiny_checkpoint import write_tiny_checkpoint
from .test_export_geometry import e2b

ONE_LAYER = dict(num_hidden_layers=1, layer_types=["full_attention"], num_kv_shared_layers=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-gemma", **ONE_LAYER)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    write_bundle(prepare_tiny(checkpoint, out, recipe="int4"))
    return out


def write_profile(path: Path, profile: DeviceProfile) -> Path:
    """`path`/NAME.yaml; YAML takes JSON."""
    file = path / f"{profile.name}.yaml"
    file.write_bytes(msgspec.json.encode(profile))
    return file


def test_the_bundle_is_whole_and_described(exported: Path, checkpoint: Path):
    bundle = open_bundle(exported, verify_hashes=True)
    manifest = bundle.manifest
    names = {path.name for path in exported.iterdir()}
    assert names == {*manifest.files, "manifest.json"}
    assert names >= {
        *("decoder.onnx", "decoder.onnx.data", "embeddings.onnx", "embeddings.onnx.data", "text.onnx"),
        *("config.json", "tokenizer.json", "tokenizer.table", "tokenizer_config.json", "chat_template.jinja"),
        *("generation_config.json", "genai_config.json"),
    }
    assert manifest.source.model == str(checkpoint) and manifest.source.revision is None
    assert manifest.source.config_sha256 == sha256_file(checkpoint / "config.json")
    assert (manifest.device, manifest.recipe, manifest.source.dtype) == ("tiny-device", "int4", "float32")
    assert manifest.geometry.num_hidden_layers == 1
    assert (manifest.caches.context, manifest.caches.dtype) == (128, "float32")
    assert manifest.caches.size_bytes == 2 * 128 * 32 * 4
    assert (manifest.tokens.bos, manifest.tokens.pad, manifest.tokens.eos) == (2, 0, (1, 16, 9))
    assert all(0 < entry.relative_error < 0.2 for entry in manifest.quantization)
    assert manifest.versions.keys() >= {"gemma-edge", "torch", "onnxruntime"}
    assert oct(exported.stat().st_mode)[-3:] == "755"


def test_sizes_are_as_predicted(exported: Path):
    """The plan's figures, made before the work, are those of the files."""
    manifest = open_bundle(exported).manifest
    tables = manifest.files["embeddings.onnx.data"].size_bytes
    rope = 2 * 128 * 16 * 4
    assert 0 <= tables + rope - manifest.memory.mapped_bytes <= 4 * 4096  # alignment
    read = manifest.memory.read_per_token_bytes
    assert (
        manifest.memory.weights_bytes < read < manifest.memory.weights_bytes + 4096
    )  # and a row of each table


def test_an_existing_bundle_is_replaced_only_when_asked(checkpoint: Path, tmp_path: Path):
    out = tmp_path / "bundle"
    write_bundle(prepare_tiny(checkpoint, out))
    first = (out / "manifest.json").read_bytes()
    with pytest.raises(ExportError, match="--force replaces it"):
        prepare_tiny(checkpoint, out, recipe="int8")
    assert (out / "manifest.json").read_bytes() == first
    write_bundle(prepare_tiny(checkpoint, out, recipe="int8", force=True))
    assert open_bundle(out).manifest.recipe == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_bundle_is_never_replaced(checkpoint: Path, tmp_path: Path, force: bool):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(ExportError, match="is not a bundle"):
        prepare_tiny(checkpoint, tmp_path / "thesis", force=force)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "words"


def test_a_failed_export_leaves_nothing_and_the_old_bundle(checkpoint: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "bundle"
    write_bundle(prepare_tiny(checkpoint, out))
    before = {path.name: sha256_file(path) for path in out.iterdir()}

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_bundle.genai, "write_genai_config", fail)
    for target in (out, tmp_path / "new"):
        with pytest.raises(ExportError, match=r"cannot be written .*No space left"):
            write_bundle(prepare_tiny(checkpoint, target, force=True))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert {path.name: sha256_file(path) for path in out.iterdir()} == before


def test_a_disk_that_fills_up_leaves_nothing(checkpoint: Path, tmp_path: Path):
    """Files may not grow beyond 100 KB: the data file of the weights does."""
    profile = write_profile(tmp_path, tiny_profile())
    out = tmp_path / "bundles" / "bundle"
    command = [sys.executable, "-m", "gemma_edge.cli", "export", "--model", str(checkpoint)]
    done = subprocess.run(
        [*command, "--device", str(profile), "--recipe", "fp32", "--out", str(out)],
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)),
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"bundle: cannot be written .*File too large.*nothing of it is kept", done.stderr)
    assert list((tmp_path / "bundles").iterdir()) == []


def test_a_full_disk_is_found_before_the_work(checkpoint: Path, tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(export_bundle.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ExportError, match=r"needs \d+ MiB, the disk has 0 MiB left"):
        prepare_tiny(checkpoint, tmp_path / "not" / "yet" / "bundle")


def test_a_tokenizer_of_another_kind_leaves_nothing(tmp_path: Path):
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", **ONE_LAYER)
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(
        re.sub(r'"byte_fallback": ?true', '"byte_fallback": false', tokenizer)
    )
    with pytest.raises(TokenizerError, match="byte_fallback"):
        write_bundle(prepare_tiny(folder, tmp_path / "bundle"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Tests that run in the background inherit an ignored SIGINT, and would hand it on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(checkpoint: Path, tmp_path: Path, number: signal.Signals):
    profile = write_profile(tmp_path, tiny_profile())
    out = tmp_path / "bundles" / "bundle"
    command = [sys.executable, "-m", "gemma_edge.cli", "export", "--model", str(checkpoint)]
    process = subprocess.Popen(
        [*command, "--device", str(profile), "--recipe", "fp32", "--out", str(out)],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONFAULTHANDLER": ""},
    )
    deadline = time.monotonic() + 120
    while not out.with_name("bundle.partial").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert b"nothing of it is kept" in errors and b"interrupted" in errors
    assert list((tmp_path / "bundles").iterdir()) == []


def test_what_a_killed_export_left_is_cleared_and_a_running_one_is_left_alone(
    checkpoint: Path, tmp_path: Path
):
    import fcntl

    partial = tmp_path / "bundle.partial"
    partial.mkdir()
    (partial / "decoder.onnx.data").write_bytes(b"half")
    prepared = prepare_tiny(checkpoint, tmp_path / "bundle")
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ExportError, match="another process is writing there"):
        write_bundle(prepared)
    assert (partial / "decoder.onnx.data").exists()
    os.close(lock)
    write_bundle(prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    open_bundle(tmp_path / "bundle", verify_hashes=True)


def test_over_budget_says_which_context_would_fit():
    """E2B in float32 caches on 2 GiB: the advice is kept, the next step up is not."""
    model = parse_text_model(e2b(), "config.json")
    profile, recipe = tiny_profile(budget_mib=2048, block=128, chunk=128), load_recipe("int4")
    with pytest.raises(BudgetError, match="grants 2048 MiB, this bundle needs") as caught:
        make_plan(model, profile, recipe, context=100_000)
    fits = int(re.search(r"--context (\d+) would fit", str(caught.value))[1])
    assert fits > 1000 and fits % 64 == 0
    assert total_bytes(make_plan(model, profile, recipe, context=fits).memory) <= 2048 << 20
    with pytest.raises(BudgetError):
        make_plan(model, profile, recipe, context=fits + 64)


def test_over_budget_at_any_context():
    model = parse_text_model(e2b(), "config.json")
    with pytest.raises(BudgetError, match="no context fits: take a smaller model"):
        make_plan(model, tiny_profile(budget_mib=1024), load_recipe("int8"), context=4096)


def test_contexts_beyond_the_model(checkpoint: Path, tmp_path: Path):
    with pytest.raises(ExportError, match="at most 4096"):
        prepare_tiny(checkpoint, tmp_path / "out", context=5000)
    assert prepare_tiny(checkpoint, tmp_path / "out", context=None).plan.caches.context == 4096


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, name: str):
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", **ONE_LAYER)
    (folder / name).unlink()
    with pytest.raises((ExportError, SourceError), match=re.escape(name)):
        prepare_tiny(folder, tmp_path / "out")


def test_a_template_inside_the_tokenizer_settings_is_enough(tmp_path: Path):
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", **ONE_LAYER)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    with pytest.raises(ExportError, match="chat template"):
        prepare_tiny(folder, tmp_path / "bundle")
    (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode(dict(chat_template=template)))
    manifest = write_bundle(prepare_tiny(folder, tmp_path / "bundle"))
    assert (tmp_path / "bundle" / "chat_template.jinja").read_text() == template
    assert manifest.tokens.eos == (1, 16, 9)  # from config.json


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile = write_profile(tmp_path, tiny_profile(block=64))
    command = [
        "export",
        "--model",
        str(checkpoint),
        "--device",
        str(profile),
        "--recipe",
        "int4",
        "--context",
        "64",
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "bundles" / "tiny-gemma-tiny-device-int4"
    assert open_bundle(out).manifest.caches.context == 64
    for words in (
        "decoder.onnx.data",
        "caches, 64 tokens, float32",
        "% of the budget",
        "read for each token",
    ):
        assert words in printed
    assert "largest quantization errors" in printed and "64 -> 16" in printed  # blocks too wide for the model
    assert main(command) == 1
    assert "--force replaces it" in capsys.readouterr().err


def test_models_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match=r"--offline was given.*MODEL=nano"):
        find_checkpoint("google/gemma-4-E2B-it", offline=True)
    with pytest.raises(SourceError, match=r"neither a folder nor a Hub id.*--model nano"):
        find_checkpoint("no such folder")
    with pytest.raises(SourceError, match=r"no config\.json"):
        find_checkpoint(str(tmp_path))


def test_a_model_in_the_hub_cache_is_found(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--google--gemma-4-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(checkpoint)
    source = find_checkpoint("google/gemma-4-tiny", offline=True)
    assert (source.name, source.revision) == ("gemma-4-tiny", commit)
    assert (source.folder / "config.json").is_file()


def test_progress_names_the_tensor_at_hand(checkpoint: Path, tmp_path: Path):
    prepared = prepare_tiny(checkpoint, tmp_path / "bundle")
    seen: dict[str, int] = {}

    def progress(name: str, weights: int) -> None:
        seen[name] = seen.get(name, 0) + weights

    write_bundle(prepared, progress)
    assert sum(seen.values()) == prepared.weight_count
    assert seen["layers.0.mlp.up_proj.weight"] == 128 * 64
