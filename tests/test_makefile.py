"""The Makefile and the scripts beside it: what they call, with which arguments, seen by stand-in programs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = "setup export ask serve demo voice test test-slow test-arm64 bench lint clean".split()


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A set-up .venv whose gemma-edge and python write their arguments, one a line, and do nothing else."""
    folder = tmp_path / "venv"
    for name in ("gemma-edge", "python"):
        program(folder / "bin" / name, f'printf "%s\\n" {name} "$@" >> {tmp_path}/calls')
    for stamp in (".setup", ".setup-device"):
        (folder / stamp).touch()
    return folder


def make(venv: Path, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT), f"VENV={venv}", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def calls(venv: Path) -> list[str]:
    path = venv.parent / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_help_lists_every_target_and_is_the_default(venv: Path) -> None:
    listed = make(venv, "help").stdout
    for target in TARGETS:
        assert f"\n  {target} " in listed
    for variable in ("DEVICE=", "MODEL=", "RECIPE=", "CONTEXT=", "PROMPT=", "BUNDLE="):
        assert variable in listed
    assert make(venv).stdout == listed
    assert calls(venv) == []


def test_export_passes_what_it_was_given(venv: Path) -> None:
    make(
        venv,
        "export",
        "DEVICE=jetson",
        "MODEL=my model",
        "RECIPE=int8",
        "CONTEXT=2048",
        "BUNDLE=out",
        "FORCE=1",
    )
    assert calls(venv) == [
        *["gemma-edge", "export", "--device", "jetson", "--model", "my model", "--out", "out"],
        *["--recipe", "int8", "--context", "2048", "--force"],
    ]


def test_export_leaves_the_rest_to_the_profile(venv: Path) -> None:
    make(venv, "export", "DEVICE=raspberry-pi")
    assert calls(venv) == ["gemma-edge", "export", "--device", "raspberry-pi"]


def test_nano_is_the_bundled_model_and_has_a_bundle_of_its_own(venv: Path) -> None:
    make(venv, "export", "MODEL=nano", "DEVICE=x86-64-generic", "CONTEXT=1024")
    assert calls(venv) == [
        *["gemma-edge", "export", "--device", "x86-64-generic", "--model", "models/nano"],
        *["--out", "bundles/nano-x86-64-generic-1024", "--context", "1024"],
    ]


@pytest.mark.parametrize("prompt", ["what's up?", 'say "hi"', "it costs $5 & $(id) `id`", "back\\slash; rm"])
def test_a_prompt_arrives_as_it_was_written(venv: Path, prompt: str) -> None:
    make(venv, "ask", "BUNDLE=some/bundle", f"PROMPT={prompt}")
    assert calls(venv) == ["gemma-edge", "ask", "some/bundle", prompt, "--stats"]


def test_ask_without_a_prompt_says_how(venv: Path) -> None:
    done = make(venv, "ask", "BUNDLE=b", check=False)
    assert done.returncode != 0
    assert "make ask PROMPT=" in done.stderr
    assert calls(venv) == []


def test_serve_uses_the_bundle_it_is_given_and_needs_no_torch(venv: Path) -> None:
    (venv / ".setup").unlink()  # a device has only the runtime
    make(venv, "serve", "BUNDLE=b")
    assert calls(venv) == ["gemma-edge", "serve", "b"]


def test_demo_exports_nano_for_the_device_and_runs_on_that_bundle(venv: Path) -> None:
    make(venv, "demo", "DEVICE=no-such-device-so-no-bundle-either")
    bundle = "bundles/nano-no-such-device-so-no-bundle-either"
    export = ["gemma-edge", "export", "--device", "no-such-device-so-no-bundle-either"]
    assert calls(venv) == [
        *export,
        *["--model", "models/nano", "--out", bundle],
        *["python", "-m", "gemma_edge.examples.sensor_summary.demo", bundle],
    ]


def test_demo_with_a_bundle_exports_nothing(venv: Path) -> None:
    make(venv, "demo", "BUNDLE=b")
    assert calls(venv) == ["python", "-m", "gemma_edge.examples.sensor_summary.demo", "b"]


VOICE = ["python", "-m", "gemma_edge.examples.voice_assistant"]


def test_voice_passes_what_it_was_given(venv: Path) -> None:
    make(
        venv, "voice", "BUNDLE=b", "WAV=my talk$1.wav", "SPEAK=out.wav", "HOME_FILE=h.yaml", "BROKER=mqtt://x"
    )
    assert calls(venv) == [
        *[*VOICE, "b", "--broker", "mqtt://x", "--wav", "my talk$1.wav"],
        *["--speak", "out.wav", "--home", "h.yaml"],
    ]


def test_voice_passes_what_is_to_be_said(venv: Path) -> None:
    make(venv, "voice", "BUNDLE=b", 'SAY=It is "dark". $HOME?', "TRANSCRIPTS=1")
    assert calls(venv) == [*VOICE, "b", "--broker", "demo", "--say", 'It is "dark". $HOME?', "--transcripts"]


def test_voice_has_a_broker_and_a_bundle_of_its_own(venv: Path) -> None:
    make(venv, "voice", "TYPED=1", "DEVICE=no-such-device-so-no-bundle-either")
    bundle = "bundles/nano-no-such-device-so-no-bundle-either"
    assert calls(venv)[-6:] == [*VOICE[1:], bundle, "--broker", "demo", "--text"][-6:]
    assert calls(venv)[:2] == ["gemma-edge", "export"]


def test_test_runs_lint_types_and_the_fast_tests(venv: Path) -> None:
    make(venv, "test")
    assert " ".join(calls(venv)) == (
        "python -m ruff check . python -m ruff format --check . python -m mypy "
        "python -m pytest -m not slow and not arm64 and not cuda"
    )


def test_test_slow_runs_the_long_ones_and_the_emulated_boards(venv: Path) -> None:
    make(venv, "test-slow")
    assert " ".join(calls(venv)) == (
        "python -m pytest -m slow python -m tools.arm64 --check python -m pytest -m arm64"
    )


def test_test_arm64_first_looks_for_what_it_needs(venv: Path) -> None:
    make(venv, "test-arm64")
    assert " ".join(calls(venv)) == "python -m tools.arm64 --check python -m pytest -m arm64"
    program(venv / "bin/python", f'printf "%s\\n" "$@" >> {venv.parent}/calls; exit 1')
    assert make(venv, "test-arm64", check=False).returncode != 0
    assert calls(venv)[-1] == "--check"  # no test was begun


def test_bench_measures_the_bundle_and_what_is_named_beside_it(venv: Path) -> None:
    make(venv, "bench", "BUNDLE=b")
    make(venv, "bench", "BUNDLE=b", "QAT=my $q", "PEERS=p p")
    assert calls(venv) == [
        *("python", "bench/targets.py", "b"),
        *("python", "bench/targets.py", "b", "my $q", "--peers", "p p"),
    ]


def test_a_failing_step_fails_the_target(venv: Path) -> None:
    program(venv / "bin/python", 'case "$*" in *mypy*) exit 1;; esac')
    assert make(venv, "lint", check=False).returncode != 0


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    old = program(tmp_path / "python3.9", '[ "$1" = --version ] && echo "Python 3.9.2" && exit 0; exit 1')
    done = make(tmp_path / "new-venv", "setup", f"PYTHON={old}", check=False)
    assert done.returncode != 0
    assert "needs Python 3.11 or later" in done.stderr
    assert "is Python 3.9.2. Name one: make setup PYTHON=python3.12" in done.stderr
    assert not (tmp_path / "new-venv").exists()


def test_setup_is_done_once(venv: Path) -> None:
    make(venv, "setup")
    assert calls(venv) == []


TORCH_ATTEMPTS = [
    "torch==1.2.3+cpu",
    "--retries 1 --timeout 15 --index-url https://download.pytorch.org/whl/cpu torch==1.2.3+cpu",
    "torch==1.2.3",
]


@pytest.mark.parametrize("works_from", [0, 1, 2])
def test_torch_is_the_cpu_build_wherever_one_can_be_had(tmp_path: Path, works_from: int) -> None:
    """The stand-in pip fails until attempt number `works_from`."""
    python = program(
        tmp_path / "python",
        f'case "$*" in -c*) exit 1;; esac\nshift 6\necho "$*" >> {tmp_path}/pip\n'
        f"[ $(wc -l < {tmp_path}/pip) -gt {works_from} ]",
    )
    program(tmp_path / "uname", "echo Linux")
    done = subprocess.run(
        [ROOT / "tools/install_torch.sh", python, "1.2.3"],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
    )
    assert (tmp_path / "pip").read_text().splitlines() == TORCH_ATTEMPTS[: works_from + 1]
    assert ("warning: no CPU build" in done.stderr) == (works_from == 2)


def test_torch_that_is_there_is_left_alone_and_an_index_is_obeyed(tmp_path: Path) -> None:
    script = ROOT / "tools/install_torch.sh"
    has_torch = program(tmp_path / "has", f'case "$*" in -c*) exit 0;; esac; touch {tmp_path}/called')
    subprocess.run([script, has_torch, "1.2.3"], check=True, timeout=30)
    assert not (tmp_path / "called").exists()
    python = program(tmp_path / "no", f'case "$*" in -c*) exit 1;; esac; echo "$*" > {tmp_path}/pip')
    subprocess.run(
        [script, python, "1.2.3"], check=True, timeout=30, env={**os.environ, "TORCH_INDEX": "https://x/y"}
    )
    assert (tmp_path / "pip").read_text().endswith("--index-url https://x/y torch==1.2.3\n")


FOR_TESTS = ["curl", "python3", "mosquitto", "mosquitto_pub", "openssl", "g++"]


def ci(tmp_path: Path, commands: list[str]) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run .ci/run where only `commands` exist, all of them stand-ins; also what those were told."""
    bin_folder = tmp_path / "bin"
    for name in ("bash", "dirname", "id"):
        bin_folder.mkdir(exist_ok=True)
        (bin_folder / name).symlink_to(shutil.which(name) or "")
    for name in ("make", "apt-get", "sudo", *commands):
        run = '"$@"' if name == "sudo" else "exit 0"
        program(bin_folder / name, f'echo {name} "$@" >> {tmp_path}/log\n{run}')
    done = subprocess.run(
        ["bash", ROOT / ".ci/run"],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": str(bin_folder), "CI": "true"},
        stdin=subprocess.DEVNULL,
        check=True,
    )
    log = [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("python3")]
    return done, [line for line in log if not line.startswith("sudo")]


def test_ci_touches_no_packages_where_all_is_there(tmp_path: Path) -> None:
    _, log = ci(tmp_path, ["git", *FOR_TESTS])
    assert log == ["make test"]


def test_ci_installs_exactly_what_is_missing(tmp_path: Path) -> None:
    done, log = ci(tmp_path, FOR_TESTS)
    assert "installing: git" in done.stdout
    assert log[0].startswith("apt-get update")
    assert log[1].endswith("--no-install-recommends git")
    assert log[-1] == "make test"
