"""The wheel on emulated Raspberry Pis, Python 3.11 and 3.13: products, x86's answers, HTTP, MQTT, memory.

Run by `make test-arm64`. Answers are compared with those of the same bundles on this machine; emulated
seconds mean nothing. What a board needs and is not here is an error that names it, never a skip.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.cli import main
from gemma_edge.examples.nano_model.windows import random_window
from gemma_edge.examples.sensor_summary.prompt import summary_messages
from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.chat import load_template
from gemma_edge.runtime.machine import read_machine
from gemma_edge.runtime.prepared import misfit
from gemma_edge.runtime.sounds import take_sounds
from gemma_edge.runtime.transcribe import transcription
from tools import arm64

from .support.arm64_products import CELLS, Kernel, kernel_of, write_products
from .support.brokers import mosquitto
from .support.daemon_process import daemon_process, request, stream
from .support.mqtt_peer import body, peer, text, user
from .support.sounds import SPEECH

pytestmark = [pytest.mark.arm64, pytest.mark.timeout(7200)]

NANO = Path(__file__).parents[1] / "models" / "nano"
PROBE = Path(__file__).with_name("support") / "arm64_probe.py"
PROFILE = "raspberry-pi-5-8gb"
BOARDS = [("3.11", "cortex-a76"), ("3.13", "cortex-a76"), ("3.11", "cortex-a72")]
LONG_S = 1800.0  # for one step of an emulated program on a busy machine

# Largest difference of two logits, which the softcap keeps within ±30. Float kernels sum in another order;
# for 4-bit weights the A76 rounds activations by rows, x86 by blocks, and the A72 not at all.
FLOAT_TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 1.5
SOFT_TOLERANCE = 1e-3  # soft tokens

Answers = dict[str, np.ndarray]
Say = Callable[[str], None]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Print a line of the report."""

    def line(words: str) -> None:
        with capsys.disabled():
            print(f"  {words}", flush=True)

    return line


@dataclass(frozen=True)
class Board:
    """An emulated board with the wheel and what it needs installed."""

    machine: arm64.Machine
    site: list[Path]

    def __str__(self) -> str:
        return f"{self.machine.cpu}, Python {self.machine.python}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arm64.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def board_of(wheel: Path) -> Callable[[str, str], Board]:
    def get(python: str, cpu: str) -> Board:
        machine = arm64.open_machine(python, cpu)
        return Board(machine, arm64.install(wheel, python, wheel.parent))

    return get


@pytest.fixture(scope="module", params=BOARDS, ids="-".join)
def board(request: pytest.FixtureRequest, board_of: Callable[[str, str], Board]) -> Board:
    return board_of(*request.param)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundled model as a bundle for a Raspberry Pi 5, by recipe."""
    folder = tmp_path_factory.mktemp("nano")

    def get(recipe: str) -> Path:
        out = folder / recipe
        options = ["--device", PROFILE, "--recipe", recipe, "--context", "2048", "--out", str(out)]
        assert out.exists() or main(["export", "--model", str(NANO), *options]) == 0
        return out

    return get


@pytest.fixture(scope="module")
def plan(nano: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What every machine runs: products, text of two lengths, sound."""
    products = tmp_path_factory.mktemp("plan") / "products"
    write_products(products)
    template = load_template(open_bundle(nano("int4")))
    window = random_window(random.Random(7), held_out=True)
    spoken = {"type": "audio", "file": SPEECH.read_bytes()}
    spoken_messages, _ = take_sounds(transcription(spoken, language="English").messages)
    question, summary, transcript = (
        template.render(messages, add_generation_prompt=True)
        for messages in (user("Hello, who are you?")["messages"], summary_messages(window), spoken_messages)
    )
    bundles = {recipe: nano(recipe) for recipe in ("fp32", "int4")}
    prompts, sound = [question, summary], dict(prompt=transcript, sound=str(SPEECH))
    return dict(
        products=str(products),
        texts={
            name: dict(bundle=str(path), prompts=prompts, new_tokens=60) for name, path in bundles.items()
        },
        genai={"genai-int4": dict(bundle=str(nano("int4")), prompts=prompts, new_tokens=60)},
        sounds={
            f"sound-{name}": dict(bundle=str(path), new_tokens=30) | sound for name, path in bundles.items()
        },
    )


@pytest.fixture(scope="module")
def here(plan: dict, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """This machine's answers."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, str(PROBE), str(folder / "plan.json"), str(folder / "out.npz")]
    subprocess.run(command, check=True, timeout=300)
    return dict(np.load(folder / "out.npz"))


@pytest.fixture(scope="module")
def packed(board: Board, nano: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the int4 bundle that the board has packed for itself."""
    folder = tmp_path_factory.mktemp("packed") / "prepared"
    prepare = ["-m", "gemma_edge.cli", "prepare", str(nano("int4")), "--prepared", str(folder)]
    done = board.machine.run(board.site, *prepare)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def there(board: Board, plan: dict, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """The board's; those of the int4 bundle also with packed weights."""
    folder = tmp_path_factory.mktemp("there")
    texts = plan["texts"] | {"packed": plan["texts"]["int4"] | {"prepared": str(packed)}}
    (folder / "plan.json").write_text(json.dumps(plan | {"texts": texts}))
    done = board.machine.run(
        board.site, str(PROBE), str(folder / "plan.json"), str(folder / "out.npz"), timeout_s=3 * LONG_S
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "out.npz"))


def test_every_wheel_is_for_arm64_or_for_any_machine(board: Board, say: Say):
    libraries = [path for folder in board.site for path in folder.rglob("*.so*") if path.is_file()]
    machines = {path.name: path.read_bytes()[18] for path in libraries if path.read_bytes()[:4] == b"\x7fELF"}
    assert machines and set(machines.values()) == {0xB7}, machines  # EM_AARCH64
    say(f"{board}: {len(machines)} libraries, all for aarch64")


def test_the_board_is_what_it_says(board: Board, there: Answers, say: Say):
    machine = str(there["machine"])
    assert machine.startswith(f"aarch64 Python {board.machine.python}.")
    done = board.machine.run(board.site, "-m", "gemma_edge.cli", "devices", "--detect")
    expected = "raspberry-pi-5" if board.machine.cpu == "cortex-a76" else "raspberry-pi-4"
    assert done.returncode == 0 and done.stdout.startswith(expected), done.stdout + done.stderr
    say(f"{board}: {machine}, detected as {done.stdout.split()[0]}")


def test_products_of_every_block_size_are_right(board: Board, plan: dict, there: Answers, say: Say):
    """Each is what its kernel computes to the last bits: the kernel that docs/arm64.md names."""
    kernels: dict[Kernel, list[str]] = {}
    for cell in CELLS:
        kernel, error = kernel_of(cell, Path(plan["products"]), there)
        assert error < 2e-5, (cell, kernel, error)
        kernels.setdefault(kernel, []).append(f"{cell.bits}/{cell.block}")
        if board.machine.cpu == "cortex-a72" or (cell.bits, cell.block) == (2, 256):
            assert kernel == Kernel.FLOAT, cell
        elif cell.bits == 4:
            assert kernel == Kernel.INT8_ROW_BF16, cell
        else:
            assert kernel == Kernel.INT8_BLOCK, cell
    for kernel, cells in kernels.items():
        say(f"{board}: {kernel.value}: {', '.join(sorted(set(cells)))}")


@pytest.mark.parametrize("recipe", ["fp32", "int4"])
def test_text_is_what_x86_says(board: Board, recipe: str, here: Answers, there: Answers, say: Say):
    for number, what in enumerate(("a question", "a summary")):
        name = f"{recipe}/{number}/"
        assert there[name + "prompt"].tolist() == here[name + "prompt"].tolist()
        say(f"{board}: {recipe}, {what}: {agreement(name, here, there, tolerance_of(recipe))}")


def test_weights_that_the_board_packed_give_the_same_logits(
    board: Board, nano: Callable[[str], Path], packed: Path, there: Answers, say: Say
):
    """To the last bit; and they are refused on other CPUs."""
    for key in ("0/ids", "0/logits", "1/ids", "1/logits"):
        assert np.array_equal(there[f"packed/{key}"], there[f"int4/{key}"]), key
    bundle = open_bundle(nano("int4"))
    refusals = []
    for cpu in arm64.CPUINFO:
        root = arm64.open_machine(board.machine.python, cpu).root
        reason = misfit(bundle, packed, read_machine(root, system="Linux", machine="aarch64"))
        assert (reason is None) == (cpu == board.machine.cpu), reason
        refusals += [reason] if reason else []
    assert "made for machine aarch64" in str(misfit(bundle, packed))
    say(f"{board}: packed weights give the same logits; elsewhere: {refusals[0].split(': ')[1]}")


def test_genai_gives_the_same_tokens(board: Board, there: Answers, say: Say):
    """The other engine on the same bundle and board: onnxruntime-genai's aarch64 wheel."""
    for number in (0, 1):
        assert there[f"genai-int4/{number}/ids"].tolist() == there[f"int4/{number}/ids"].tolist()
    say(f"{board}: onnxruntime-genai, int4, a question and a summary: the same tokens")


@pytest.mark.parametrize("recipe", ["fp32", "int4"])
def test_sound_is_heard_as_on_x86(board: Board, recipe: str, here: Answers, there: Answers, say: Say):
    name = f"sound-{recipe}/"
    apart = float(np.abs(here[name + "soft"] - there[name + "soft"]).max())
    assert here[name + "soft"].shape == there[name + "soft"].shape
    assert apart < (SOFT_TOLERANCE if recipe == "fp32" else ROUNDED_TOLERANCE)
    found = agreement(name, here, there, tolerance_of(recipe))
    say(f"{board}: {recipe}, sound: soft tokens within {apart:.1e}; {found}")


@pytest.mark.parametrize("python", list(arm64.RELEASES))
def test_the_daemon_answers_on_its_socket_and_over_mqtt(
    python: str, board_of: Callable[[str, str], Board], nano: Callable[[str], Path], tmp_path: Path, say: Say
):
    """One greedy question: x86's words over HTTP, streamed, over MQTT; memory; a clean end."""
    board = board_of(python, "cortex-a76")
    path = tmp_path / "gemma.sock"
    question = user("Hello, who are you?") | {"max_tokens": 24, "temperature": 0}
    with mosquitto(tmp_path) as broker, peer(broker.port, "gemma-edge/pi/response/chat") as client:
        serve = ["-m", "gemma_edge.cli", "serve", str(nano("int4")), "--socket", str(path), "--node", "pi"]
        serve += ["--mqtt", f"mqtt://127.0.0.1:{broker.port}"]
        with daemon_process([sys.executable, *serve], tmp_path / "x86.log") as daemon:
            expected = content(request(path, "POST", "/v1/chat/completions", question))
            native = arm64.memory(daemon.process.pid)
        command, environment = board.machine.command(*serve), board.machine.environment(*board.site)
        with daemon_process(command, tmp_path / "arm.log", environment, ready=False) as daemon:
            daemon.wait_ready(LONG_S)
            ask = ("POST", "/v1/chat/completions", question)
            assert content(request(path, *ask, timeout_s=LONG_S)) == expected
            chunks = [json.loads(event) for event in stream(path, question, timeout_s=LONG_S)[:-1]]
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
            client.send(question | {"transaction": 1}, topic="gemma-edge/pi/request/chat")
            (reply,) = client.wait(1, timeout_s=LONG_S)
            assert text(reply) == expected and body(reply)["transaction"] == 1
            used = arm64.memory(daemon.process.pid)
            daemon.terminate()
            assert daemon.wait_exit(600) == 0
    assert used.anonymous_bytes < 1.5 * native.anonymous_bytes + (32 << 20)
    say(
        f"{board}: daemon with nano int4: {used}, and {used.emulator_bytes >> 20} of the emulator's; "
        f"x86: {native}"
    )


def content(response: tuple[int, dict[str, str], Any]) -> str:
    status, _, answer = response
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


def tolerance_of(recipe: str) -> float:
    return FLOAT_TOLERANCE if recipe == "fp32" else ROUNDED_TOLERANCE


def agreement(name: str, here: Answers, there: Answers, tolerance: float) -> str:
    """Asserts that two greedy answers are the same, or part at a near-tie; in words."""
    ours, theirs = here[name + "ids"].tolist(), there[name + "ids"].tolist()
    same = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    compared = len(ours) if same is None else same + 1  # of those that had the same before them
    logits, others = here[name + "logits"][:compared], there[name + "logits"][:compared]
    apart = float(np.abs(logits - others).max())
    assert apart < tolerance, f"{name}: logits differ by up to {apart}, expected {tolerance} at most"
    if same is None:
        assert len(ours) == len(theirs)
        return f"{len(ours)} tokens, the same; logits within {apart:.1e}"
    margin = float(logits[same, ours[same]] - logits[same, theirs[same]])
    assert 0 <= margin <= 2 * apart, f"{name}: token {same} differs, with a margin of {margin} on x86"
    return (
        f"the same {same} tokens, then a near-tie ({ours[same]} over {theirs[same]} by {margin:.2e} on x86); "
        f"logits within {apart:.1e}"
    )
