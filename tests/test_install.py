"""What pip installs where: no onnxruntime unasked, wheels for every device, a unit that systemd takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys
sys.modules["onnxruntime"] = None
from gemma_edge.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_onnxruntime_the_command_says_how_to_get_it(tiny_bundle):
    bundle = tiny_bundle(context=192, chunk=16).path
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "ask", str(bundle), "hello"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "gemma-edge[cpu]" in done.stderr and "gemma-edge[cuda]" in done.stderr
    assert "Traceback" not in done.stderr


def test_onnxruntime_comes_with_one_extra_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert not [need for need in project["dependencies"] if need.startswith("onnxruntime")]
    brought = {
        name: [need for need in needs if need.startswith("onnxruntime")] for name, needs in extras.items()
    }
    assert {name for name, needs in brought.items() if needs} == {"cpu", "cuda", "genai", "genai-cuda"}


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path):
    verify = shutil.which("systemd-analyze")
    unit = (ROOT / "deploy" / "gemma-edge.service").read_text()
    assert "Type=notify" in unit and "ExecStart=/opt/gemma-edge/bin/gemma-edge serve" in unit
    if verify is None:  # not on macOS; .ci/run's machines have it
        return
    command = tmp_path / "gemma-edge"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    path = tmp_path / "gemma-edge.service"
    path.write_text(unit.replace("/opt/gemma-edge/bin/gemma-edge", str(command)))
    done = subprocess.run(
        [verify, "verify", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    about_ours = [line for line in done.stderr.splitlines() if "gemma-edge" in line]
    assert done.returncode == 0 and not about_ours, done.stderr


@dataclass(frozen=True)
class Platform:
    """Where wheels must be found."""

    name: str
    python: str
    tags: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def linux(machine: str, glibc_minor: int) -> tuple[str, ...]:
    """The manylinux tags that a glibc takes, newest first."""
    versions = [f"manylinux_2_{minor}_{machine}" for minor in range(glibc_minor, 16, -1)]
    return (*versions, f"manylinux2014_{machine}")


MAC = ("macosx_14_0_arm64",)
PLATFORMS = [
    Platform("Raspberry Pi OS 12", "3.11", linux("aarch64", 36)),
    Platform("Raspberry Pi OS 13", "3.13", linux("aarch64", 41)),
    Platform("JetPack 7, Ubuntu on Snapdragon", "3.12", linux("aarch64", 39)),
    Platform("macOS 14, Python 3.11", "3.11", MAC),
    Platform("macOS 14, Python 3.12", "3.12", MAC),
    Platform("macOS 14, Python 3.13", "3.13", MAC),
    Platform("Ubuntu 24.04 on x86-64", "3.12", linux("x86_64", 39)),
    Platform("Debian 13 on x86-64", "3.13", linux("x86_64", 41)),
]
CUDA_PLATFORMS = [platform for platform in PLATFORMS if platform.python == "3.12" and platform.tags != MAC]


def would_install(platform: Platform, *extras: str) -> dict[str, str]:
    """What pip would install there, wheels only: name -> version. Asks the package index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *needs_of(project["optional-dependencies"], *extras)]
    where = [f"--platform={tag}" for tag in platform.tags]
    where += [f"--python-version={platform.python}", "--implementation=cp", "--only-binary=:all:"]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--dry-run"]
    done = subprocess.run(
        [*pip, "--ignore-installed", "--target=unused", "--report=-", *where, *needs],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{platform}, {extras}: {done.stderr[-2000:]}"
    return {
        item["metadata"]["name"].lower(): item["metadata"]["version"]
        for item in json.loads(done.stdout)["install"]
    }


def needs_of(optional: dict[str, list[str]], *extras: str) -> list[str]:
    """The packages of some extras, and of the extras that these name."""
    needs = []
    for need in (need for extra in extras for need in optional[extra]):
        own = need.startswith("gemma-edge[")
        needs += needs_of(optional, *need[len("gemma-edge[") : -1].split(",")) if own else [need]
    return needs


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS, ids=str)
def test_every_device_has_wheels(platform: Platform):
    """All extras of the device. Needs the package index."""
    found = would_install(platform, "cpu", "http", "audio", "voice", "genai")
    assert found["onnxruntime-genai"].startswith("0.18.")
    assert found["onnxruntime"].startswith("1.32.")
    assert not {"torch", "transformers", "onnx", "onnxruntime-gpu"} & set(found)


@pytest.mark.slow
@pytest.mark.parametrize("platform", CUDA_PLATFORMS, ids=str)
def test_cuda_brings_its_onnxruntime_alone(platform: Platform):
    found = would_install(platform, "cuda", "http", "audio")
    assert "onnxruntime-gpu" in found and "onnxruntime" not in found
    assert {"nvidia-cuda-runtime", "nvidia-cudnn-cu13", "cuda-core", "nvidia-cuda-nvrtc"} <= set(found)
