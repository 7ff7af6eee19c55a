"""What runs on the device loads none of the host's packages, and the command line starts light."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import gemma_edge.runtime

HOST_ONLY = ("torch", "transformers", "optimum", "onnx", "onnxscript", "onnx_ir", "tokenizers", "safetensors")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(gemma_edge.runtime.__path__, "gemma_edge.runtime.")
    if not module.ispkg
)


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Top-level names in sys.modules after `code` ran in a process of its own."""
    report = "\nimport sys; print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code + report, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("LOADED "))
    return set(line.split()[1:])


def test_there_are_modules_to_look_at():
    assert {"gemma_edge.runtime.engine", "gemma_edge.runtime.service", "gemma_edge.runtime.cli"} <= set(
        MODULES
    )


def test_no_runtime_module_loads_a_host_package():
    loaded = loaded_by(
        "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)", *MODULES
    )
    assert "onnxruntime" in loaded and "sentencepiece" not in loaded
    assert not loaded & set(HOST_ONLY)


def test_the_command_line_starts_without_the_engine():
    loaded = loaded_by("from gemma_edge.cli import build_parser\nbuild_parser()")
    assert "gemma_edge" in loaded
    assert not loaded & {*HOST_ONLY, "onnxruntime", "uvicorn", "starlette"}


@pytest.mark.parametrize("stats", [[], ["--stats"]])
def test_asking_loads_no_host_package(tiny_bundle, stats: list[str]):
    code = "import sys\nfrom gemma_edge.cli import main\nassert main(sys.argv[1:]) == 0"
    loaded = loaded_by(
        code, "ask", str(tiny_bundle(context=192, chunk=16).path), "temperature?", "--max-tokens", "3", *stats
    )
    assert "onnxruntime" in loaded
    assert not loaded & set(HOST_ONLY)


def test_a_daemon_is_small_before_it_has_a_model():
    names = ("engine", "service", "chat", "tokenizer", "sounds", "audio.encoder", "serve", "transports.http")
    names += ("transports.mqtt", "transports.wyoming")
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    code += "\nfrom gemma_edge.runtime.stats import memory_use\nassert memory_use().rss_bytes < 80e6"
    loaded_by(code, *(f"gemma_edge.runtime.{name}" for name in names))
