"""Detection: every profile is found on its own device and no other, and odd machines get a helpful answer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_edge.runtime import detect as detect_module
from gemma_edge.runtime.detect import (
    add_devices_arguments,
    detect,
    resolve_profile,
    run_devices,
    text_table,
)
from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.machine import Machine, read_machine, usable_cpus
from gemma_edge.runtime.profile import load_profiles

from .support.machines import A76, A78AE, BOARDS, R36, R38, Board, write_root

PROFILES = load_profiles()
CASES = [(name, board) for name, boards in BOARDS.items() for board in boards]


def look(root: Path, board: Board, **changes: object) -> Machine:
    machine = read_machine(write_root(root, board), system="Linux", machine=board.machine)
    return dataclasses.replace(machine, **changes)


@pytest.mark.parametrize(("name", "board"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_every_device_is_detected_from_its_own_files(tmp_path: Path, name: str, board: Board) -> None:
    machine = look(tmp_path, board)
    detection = detect(machine, PROFILES)
    assert detection.profile.name == name
    assert detection.reasons
    # One look at the profiles in another order gives the same answer: nothing hangs on the order of files.
    assert detect(machine, PROFILES[::-1]).profile.name == name


def test_every_profile_has_a_machine_to_be_detected_on() -> None:
    assert sorted(BOARDS) == [profile.name for profile in PROFILES]


def test_the_facts_are_read_from_the_files(tmp_path: Path) -> None:
    machine = look(tmp_path, BOARDS["jetson-orin-nano-8gb"][1])
    assert machine.device_tree_model == "NVIDIA Orin Nano Developer Kit"  # without the NUL
    assert machine.device_tree_compatible[-1] == "nvidia,tegra234"
    assert machine.tegra_release.startswith("R36 (release), REVISION: 4.4")
    assert (machine.tegra_major, machine.is_tegra) == (36, True)
    assert machine.cpus == ("0x41:0xd42",)
    assert machine.cores == 6
    assert "asimddp" in machine.cpu_features
    assert machine.memory_mib == 6600000 // 1024


def test_features_are_those_of_every_core(tmp_path: Path) -> None:
    root = write_root(tmp_path, BOARDS["raspberry-pi-5-8gb"][0])
    path = root / "proc/cpuinfo"
    path.write_text(path.read_text().replace(" asimddp", "", 1))  # one core lacks it
    assert "asimddp" not in read_machine(root, system="Linux", machine="aarch64").cpu_features


def test_macos_is_asked_with_sysctl(tmp_path: Path) -> None:
    answers = {
        "machdep.cpu.brand_string": "Apple M2",
        "hw.memsize": str(16 << 30),
        "hw.physicalcpu": "8",
    }
    machine = read_machine(tmp_path, system="Darwin", machine="arm64", sysctl=answers.__getitem__)
    assert machine == Machine("Darwin", "arm64", cpus=("Apple M2",), cores=8, memory_mib=16384)
    assert detect(machine, PROFILES).profile.name == "apple-silicon-16gb"
    small = read_machine(tmp_path, system="Darwin", machine="arm64", sysctl=lambda _: "")
    assert small.memory_mib is None


@pytest.mark.parametrize(
    ("board", "expected"),
    [
        (  # A board with the same cores as a Pi 5, and 16 GB
            Board(16300000, 8, "0x41:0xd0b", A76, "Radxa ROCK 5B", ("radxa,rock-5b", "rockchip,rk3588")),
            ["Radxa ROCK 5B", "rockchip,rk3588", "--device raspberry-pi-5-16gb"],
        ),
        (  # Orin NX 8 GB: a Jetson, but none of ours
            Board(
                7802900, 6, "0x41:0xd42", A78AE, "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
                ("nvidia,p3768-0000+p3767-0001", "nvidia,p3767-0001", "nvidia,tegra234"), R38,
            ),
            ["jetson-orin-nx-16gb is this device with 14,336 MiB or more", "--device jetson-orin-nano-8gb"],
        ),
        (  # AGX Orin 32 GB: the device tree names the 64 GB kit's model
            Board(
                31300000, 8, "0x41:0xd42", A78AE, "NVIDIA Jetson AGX Orin Developer Kit",
                ("nvidia,p3737-0000+p3701-0000", "nvidia,p3701-0000", "nvidia,tegra234"), R38,
            ),
            ["jetson-agx-orin-64gb is this device with 57,344 MiB", "--device jetson-orin-nx-16gb"],
        ),
        (  # Orin Nano 4 GB: no CUDA profile is small enough
            Board(
                3400000, 6, "0x41:0xd42", A78AE, "NVIDIA Jetson Orin Nano Developer Kit",
                ("nvidia,p3768-0000+p3767-0004", "nvidia,p3767-0004", "nvidia,tegra234"), R38,
            ),
            ["--device raspberry-pi-5-4gb"],
        ),
        (  # Pi 4 with 1 GB: nothing fits
            Board(900000, 4, "0x41:0xd08", "fp asimd", "Raspberry Pi 4 Model B Rev 1.1", ("brcm,bcm2711",)),
            ["raspberry-pi-4-4gb is this device with 3,400 MiB or more", "No profile is near"],
        ),
        (Board(0, 0, "0x41:0xd0b", ""), ["memory unknown", "Nearest"]),
    ],
)  # fmt: skip
def test_an_unknown_arm_machine_is_told_what_was_seen_and_what_is_near(
    tmp_path: Path, board: Board, expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        detect(look(tmp_path, board), PROFILES)
    for part in ["no device profile fits this machine. Seen: Linux aarch64", *expected]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("Linux", "armv7l", "32-bit system (armv7l)"),
        ("Linux", "i686", "32-bit system"),
        ("Windows", "ARM64", "on Windows use WSL 2"),
        ("", "", "an unknown system"),
        ("Linux", "riscv64", "Seen: Linux riscv64"),
        ("Darwin", "x86_64", "Seen: Darwin x86_64"),
    ],
)
def test_systems_that_cannot_run(system: str, machine: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        detect(Machine(system, machine), PROFILES)
    assert expected in str(caught.value)


def test_memory_that_cannot_be_read_takes_the_smallest_and_says_so() -> None:
    machine = Machine("Linux", "aarch64", device_tree_model="Raspberry Pi 5 Model B Rev 1.0")
    detection = detect(machine, PROFILES)
    assert detection.profile.name == "raspberry-pi-5-4gb"
    assert any("memory unknown" in reason for reason in detection.reasons)


def test_two_profiles_that_fit_equally_are_an_error() -> None:
    import msgspec

    profile = next(p for p in PROFILES if p.name == "raspberry-pi-5-8gb")
    twin = msgspec.structs.replace(profile, name="twin", aliases=())
    machine = Machine("Linux", "aarch64", device_tree_model="Raspberry Pi 5 Model B", memory_mib=8000)
    with pytest.raises(ConfigError, match=r"several profiles fit equally \(raspberry-pi-5-8gb, twin\)"):
        detect(machine, [profile, twin])


def test_notes_say_what_is_odd_about_this_machine(tmp_path: Path) -> None:
    celeron = detect(look(tmp_path, BOARDS["x86-64-generic"][1]), PROFILES).notes
    assert any("lacks avx2" in note for note in celeron)
    assert any("1,953 MiB of memory, the profile assumes 8,192" in note for note in celeron)
    assert any("1 cores, fewer than the profile's threads: the engine takes 1" in note for note in celeron)


@pytest.mark.parametrize(("release", "warned"), [(R36, True), (R38, False)])
def test_an_old_jetpack_is_noted(tmp_path: Path, release: str, warned: bool) -> None:
    board = dataclasses.replace(BOARDS["jetson-orin-nano-8gb"][0], tegra_release=release)
    notes = detect(look(tmp_path, board), PROFILES).notes
    assert any("R36: CUDA needs R38 (JetPack 7)" in note for note in notes) == warned
    assert len(notes) == warned


garbage = st.one_of(
    st.binary(max_size=300),
    st.lists(
        st.sampled_from(
            [b"processor", b"Features", b"flags", b"CPU part", b"CPU implementer", b"Model", b"MemTotal:",
             b":", b" ", b"\n", b"\0", b"kB", b"99999999999999999999", b"0x41", b"# R", b"R38", b"\xff",
             b"nvidia,tegra234"]
        ),
        max_size=60,
    ).map(b"".join),
)  # fmt: skip


@settings(max_examples=300)
@given(
    files=st.dictionaries(
        st.sampled_from(
            ["proc/meminfo", "proc/cpuinfo", "proc/device-tree/model", "proc/device-tree/compatible",
             "etc/nv_tegra_release"]
        ),
        garbage,
    ),
    system=st.sampled_from(["Linux", "Darwin", "Windows", "Plan 9", ""]),
    machine=st.sampled_from(["aarch64", "arm64", "x86_64", "AMD64", "armv7l", "mips", ""]),
    answer=st.text(max_size=30),
)  # fmt: skip
def test_detection_never_raises_on_garbage(
    files: dict[str, bytes], system: str, machine: str, answer: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        seen = read_machine(Path(folder), system=system, machine=machine, sysctl=lambda _: answer)
    try:
        assert detect(seen, PROFILES).profile in PROFILES
    except ConfigError as error:  # the only thing it may raise, and it says something
        assert len(str(error)) > 40


def test_folders_and_endless_files_in_place_of_facts(tmp_path: Path) -> None:
    (tmp_path / "proc/device-tree/model").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").symlink_to("/dev/zero")  # read up to a limit, then left
    (tmp_path / "proc/meminfo").symlink_to(tmp_path / "proc/meminfo")
    machine = read_machine(tmp_path, system="Linux", machine="aarch64")
    assert machine == Machine("Linux", "aarch64")


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_devices_arguments(parser)
    return parser.parse_args(argv)


def test_devices_lists_all_in_aligned_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_devices(parse()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PROFILES) + 1
    column = lines[0].index("TITLE")
    for line, profile in zip(lines[1:], PROFILES, strict=True):
        assert line.split()[0] == profile.name
        assert line[column:] == profile.title
    assert "jetson-orin-nano-8gb  jetson" in text_table(PROFILES)


def test_devices_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_devices(parse("--json")) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == [profile.name for profile in PROFILES]
    assert listed[3]["memory"]["bandwidth_gb_s"] == 102.0


def test_devices_detect_prints_the_name_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = look(tmp_path, BOARDS["raspberry-pi-5-8gb"][0])
    monkeypatch.setattr(detect_module, "read_machine", lambda: machine)
    assert run_devices(parse("--detect")) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "raspberry-pi-5-8gb"
    assert "because: device-tree model 'Raspberry Pi 5 Model B Rev 1.0'" in out
    assert run_devices(parse("--detect", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "raspberry-pi-5-8gb"


def test_auto_is_this_machine_and_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = look(tmp_path, BOARDS["x86-64-generic"][1])
    monkeypatch.setattr(detect_module, "read_machine", lambda: machine)
    with caplog.at_level(logging.INFO):
        assert resolve_profile("auto").name == "x86-64-generic"
    assert "device x86-64-generic: Linux x86_64" in caplog.text
    assert "lacks avx2" in caplog.text
    assert resolve_profile("jetson").name == "jetson-orin-nano-8gb"


def test_usable_cpus_are_those_this_process_may_run_on() -> None:
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            assert usable_cpus() == 1
        finally:
            os.sched_setaffinity(0, allowed)


def test_the_machine_under_the_tests_can_be_read() -> None:
    machine = read_machine()
    assert machine.memory_mib
    assert machine.memory_mib > 256
    assert machine.describe()
