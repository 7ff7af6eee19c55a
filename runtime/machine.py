"""What machine this is, read from the files of /proc and /etc. Knows their formats; no device, no profile.

Never raises on odd content: what cannot be read or understood is left empty.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_BYTES = 1 << 20  # /proc/cpuinfo of a machine with hundreds of CPUs stays below this
MAX_WORD_CHARS = 200


@dataclass(frozen=True)
class Machine:
    """Facts about one machine. Empty strings, tuples and None: unknown."""

    system: str  # platform.system(): "Linux", "Darwin"
    machine: str  # platform.machine(): "aarch64", "x86_64", "arm64"
    device_tree_model: str = ""  # "Raspberry Pi 5 Model B Rev 1.0"
    device_tree_compatible: tuple[str, ...] = ()  # ("raspberrypi,5-model-b", "brcm,bcm2712")
    tegra_release: str = ""  # first line of /etc/nv_tegra_release, without its "# "
    cpus: tuple[str, ...] = ()  # names, and "implementer:part" ("0x41:0xd0b") on ARM Linux
    cpu_features: frozenset[str] = frozenset()  # those that every core has
    cores: int | None = None
    memory_mib: int | None = None  # as the system reports it

    @property
    def tegra_major(self) -> int | None:
        """The release number of Jetson Linux: 38 for "R38 (release), REVISION: 2.0"."""
        match = re.match(r"R(\d{1,3})\b", self.tegra_release)
        return int(match[1]) if match else None

    @property
    def is_tegra(self) -> bool:
        """Is it an NVIDIA Tegra, by its release file or its device tree?"""
        return bool(self.tegra_release) or any(
            word.startswith("nvidia,tegra") for word in self.device_tree_compatible
        )

    def describe(self) -> str:
        """All that was seen, in one line."""
        parts = [f"{self.system or 'unknown system'} {self.machine or 'unknown architecture'}"]
        if self.device_tree_model or self.device_tree_compatible:
            compatible = ", ".join(self.device_tree_compatible[:4])
            parts.append(
                f"device tree {self.device_tree_model!r}" + (f" ({compatible})" if compatible else "")
            )
        if self.tegra_release:
            parts.append(f"Jetson Linux {self.tegra_release.split(',')[0]}")
        if self.cpus:
            parts.append("CPU " + ", ".join(self.cpus[:4]))
        if self.cores:
            parts.append(f"{self.cores} cores")
        parts.append(f"{self.memory_mib:,} MiB of memory" if self.memory_mib else "memory unknown")
        return "; ".join(parts)


def read_machine(
    root: Path = Path("/"),
    *,
    system: str | None = None,
    machine: str | None = None,
    sysctl: Callable[[str], str] | None = None,
) -> Machine:
    """The machine whose files are under `root`. `system`, `machine` and `sysctl`: default to our own."""
    system = platform.system() if system is None else system
    machine = platform.machine() if machine is None else machine
    if system == "Darwin":
        return _read_darwin(machine, sysctl or _sysctl)
    cpuinfo = _read_cpuinfo(_read(root / "proc/cpuinfo"))
    model = _words(_read(root / "proc/device-tree/model"))
    return Machine(
        system=system,
        machine=machine,
        # Containers often hide the device tree; Raspberry Pi's kernel says the model in cpuinfo as well.
        device_tree_model=model[0] if model else cpuinfo.board,
        device_tree_compatible=_words(_read(root / "proc/device-tree/compatible")),
        tegra_release=_read_tegra_release(_read(root / "etc/nv_tegra_release")),
        cpus=cpuinfo.names,
        cpu_features=cpuinfo.features,
        cores=cpuinfo.cores or None,
        memory_mib=_read_memory_mib(_read(root / "proc/meminfo")),
    )


def usable_cpus() -> int:
    """CPUs that this process may run on: fewer than the machine has in a container or under `taskset`."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_darwin(machine: str, sysctl: Callable[[str], str]) -> Machine:
    name, memory, cores = (
        sysctl(key) for key in ("machdep.cpu.brand_string", "hw.memsize", "hw.physicalcpu")
    )
    return Machine(
        system="Darwin",
        machine=machine,
        cpus=(name[:MAX_WORD_CHARS],) if name else (),
        cores=_number(cores),
        memory_mib=(_number(memory) or 0) >> 20 or None,
    )


def _sysctl(key: str) -> str:
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode("utf-8", errors="replace")
    except (OSError, ValueError):  # ValueError: a path that no file can have
        return ""


def _words(text: str) -> tuple[str, ...]:
    """The strings of a device-tree property: each ends with a NUL."""
    return tuple(word[:MAX_WORD_CHARS] for part in text.split("\0") if (word := part.strip()))


def _read_tegra_release(text: str) -> str:
    """ "R38 (release), REVISION: 2.0, ..." from "# R38 (release), REVISION: 2.0, ..."."""
    first = text.split("\n", 1)[0].lstrip("# ").strip()
    return first[:MAX_WORD_CHARS] if re.match(r"R\d", first) else ""


def _read_memory_mib(text: str) -> int | None:
    match = re.search(r"^MemTotal:\s*(\d{1,15})\s*kB", text, re.MULTILINE)
    return int(match[1]) // 1024 or None if match else None


@dataclass(frozen=True)
class _CpuInfo:
    names: tuple[str, ...]
    features: frozenset[str]
    cores: int
    board: str


def _read_cpuinfo(text: str) -> _CpuInfo:
    """Parse /proc/cpuinfo: ARM says "Features" and "CPU part" where x86 says "flags" and "model name"."""
    names: dict[str, None] = {}  # in order, once each
    features: frozenset[str] | None = None
    cores, implementer, board = 0, "", ""
    for line in text.split("\n"):
        key, _, value = line.partition(":")
        key, value = key.strip(), value.strip()
        if key == "processor":
            cores += 1
        elif key in ("Features", "flags"):
            seen = frozenset(value.split())
            features = seen if features is None else features & seen
        elif key == "model name" and value:
            names[value[:MAX_WORD_CHARS]] = None
        elif key == "CPU implementer":
            implementer = value.lower()
        elif key == "CPU part" and implementer:
            names[f"{implementer}:{value.lower()}"[:MAX_WORD_CHARS]] = None
        elif key == "Model":
            board = value[:MAX_WORD_CHARS]
    return _CpuInfo(tuple(names), features or frozenset(), cores, board)


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
