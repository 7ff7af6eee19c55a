"""What pip installs where: no onnxruntime unasked, wheels for every device, a unit that systemd takes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

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
