"""An arm64 machine where there is none: Debian's Python in a folder, aarch64 wheels, qemu to run them.

    python -m tools.arm64 --python 3.11 -- -m gemma_edge.cli devices --detect

Needs qemu-user and, to make the folder the first time, apt and the network; no root. What it makes stays in
~/.cache/gemma-edge/arm64 (GEMMA_EDGE_ARM64). It knows wheels, not what is in them.

    sources.list --apt, unprivileged--> arm64 packages of Python --dpkg-deb--> root/      + proc/cpuinfo
    pyproject.toml --pip--> gemma-edge's wheel --pip, aarch64 wheels only--> site-packages
    qemu-aarch64 -cpu cortex-a76 -L root/ root/usr/bin/python3.11 …
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .kept_folder import kept_folder

PROJECT = Path(__file__).resolve().parents[1]
EXTRAS = "cpu,http,audio,voice,genai"  # all that is made for the device
MIRROR = os.environ.get("GEMMA_EDGE_DEBIAN_MIRROR", "http://deb.debian.org/debian")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
NICE = 15  # emulation takes minutes of all cores: whatever else runs goes first


@dataclass(frozen=True)
class Release:
    """A Debian release and its Python: what Raspberry Pi OS of the same number has."""

    suite: str
    python: str
    glibc_minor: int  # 2.36: the newest manylinux tag that it takes


RELEASES = {
    "3.11": Release("bookworm", "3.11", 36),  # Raspberry Pi OS 12
    "3.13": Release("trixie", "3.13", 41),  # Raspberry Pi OS 13
}
PACKAGES = ["python3-minimal", "libpython3-stdlib", "libstdc++6", "ca-certificates"]

# What /proc/cpuinfo of the boards says; onnxruntime looks here for the instructions it may use.
CPUINFO = {
    "cortex-a76": (
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        "0xd0b",
        "Raspberry Pi 5 Model B Rev 1.0",
    ),
    "cortex-a72": ("fp asimd evtstrm crc32 cpuid", "0xd08", "Raspberry Pi 4 Model B Rev 1.5"),
}


class Arm64Error(Exception):
    """Something is missing on this machine; the message says what to do."""


@dataclass(frozen=True)
class Machine:
    """A root folder with Python and a CPU; its `usr/bin/python3.11` is a script that starts the emulator."""

    root: Path
    python: str  # "3.11"
    cpu: str

    @property
    def interpreter(self) -> Path:
        """What Python takes for itself: a child process that it starts is emulated too."""
        return self.root / "usr" / "bin" / f"python{self.python}"

    def command(self, *arguments: str) -> list[str]:
        """The command that runs Python with `arguments`."""
        return ["nice", "-n", str(NICE), str(self.interpreter), *arguments]

    def environment(self, *site: Path) -> dict[str, str]:
        """Nothing of this machine's Python; `site`: folders of packages."""
        kept = {name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR", "LANG") if name in os.environ}
        own = {
            "PYTHONPATH": os.pathsep.join(map(str, site)),
            "PYTHONNOUSERSITE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        return kept | own

    def run(
        self, site: Sequence[Path], *arguments: str, timeout_s: float = 1800
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; output as text, status unchecked."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment(*site),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def cache_folder() -> Path:
    given = os.environ.get("GEMMA_EDGE_ARM64")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else caches / "gemma-edge" / "arm64"


def open_machine(python: str, cpu: str = "cortex-a76") -> Machine:
    """A machine with that Python, made if it is not in the cache. Raises Arm64Error."""
    if python not in RELEASES:
        raise Arm64Error(f"Python {python}: expected one of {', '.join(RELEASES)}")
    if cpu not in CPUINFO:
        raise Arm64Error(f"CPU {cpu}: expected one of {', '.join(CPUINFO)}")
    qemu = find_qemu()
    base = _base_root(RELEASES[python])
    machine = Machine(cache_folder() / "boards" / f"{cpu}-python{python}", python, cpu)
    _finish_root(base, machine, qemu)
    return machine


def find_qemu() -> str:
    """qemu's user-mode emulator for arm64. Raises Arm64Error."""
    if platform.system() != "Linux":
        raise Arm64Error(f"qemu's user-mode emulation needs Linux; this is {platform.system()}")
    for name in ("qemu-aarch64-static", "qemu-aarch64"):
        if found := shutil.which(name):
            return found
    raise Arm64Error(
        "qemu's user-mode emulator for arm64 is not installed: apt install qemu-user-static "
        "(Debian 13: qemu-user)"
    )


def check_tools() -> None:
    """What making and running a board takes is on this machine. Raises Arm64Error."""
    find_qemu()
    for name in ("apt-get", "dpkg-deb"):
        if not shutil.which(name):
            raise Arm64Error(
                f"{name} is not here: the root folder is made of Debian packages, on Debian or Ubuntu"
            )
    if not KEYRING.exists():
        raise Arm64Error(f"{KEYRING} is not here: apt install debian-archive-keyring")


# ---- The root folder


def _base_root(release: Release) -> Path:
    """Debian's Python for arm64, unpacked; no package is configured and no script of one is run."""
    folder = cache_folder() / f"{release.suite}-python{release.python}"

    def make(root: Path) -> None:
        check_tools()
        print(f"making {folder} of Debian {release.suite}'s arm64 packages", file=sys.stderr)
        for package in _download_packages(release, root.with_name("apt")):
            _run(["dpkg-deb", "--extract", str(package), str(root)], "unpacking")
        if not (root / "lib").exists():  # Debian 13: everything is below /usr
            (root / "lib").symlink_to("usr/lib")
        if not (root / "lib/ld-linux-aarch64.so.1").exists():
            raise Arm64Error(f"the packages of {release.suite} hold no loader for arm64: {root}")

    return kept_folder(folder, make)


def _download_packages(release: Release, folder: Path) -> list[Path]:
    """PACKAGES for arm64 and all they need, resolved and checked by apt, which gets folders of its own."""
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()  # nothing is installed
    (folder / "sources").write_text(f"deb [signed-by={KEYRING}] {MIRROR} {release.suite} main\n")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        "Dir::Etc::SourceList": str(folder / "sources"),
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::State": str(folder),
        "Dir::State::Lists": str(folder / "lists"),
        "Dir::State::status": str(folder / "status"),
        "Dir::Cache": str(folder),
        "Dir::Cache::Archives": str(folder / "archives"),
        "Debug::NoLocking": "true",
    }
    config = folder / "apt.conf"
    config.write_text("#clear APT::Architectures;\n" + "".join(f'{k} "{v}";\n' for k, v in settings.items()))
    environment = os.environ | {"APT_CONFIG": str(config)}
    reach = f"downloading Debian packages from {MIRROR} (no network? GEMMA_EDGE_DEBIAN_MIRROR names another)"
    _run(["apt-get", "-qq", "--error-on=any", "update"], reach, environment)
    _run(["apt-get", "-qq", "-y", "--download-only", "install", *PACKAGES], reach, environment)
    return sorted((folder / "archives").glob("*.deb"))


def _finish_root(base: Path, machine: Machine, qemu: str) -> None:
    """`base` with a CPU: links to its folders, the board's /proc/cpuinfo, the script with the emulator."""
    features, part, board = CPUINFO[machine.cpu]
    processor = (
        f"BogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: {part}\nCPU revision\t: 1\n"
    )
    cores = "\n".join(f"processor\t: {number}\n{processor}" for number in range(os.cpu_count() or 1))
    emulator = [qemu, "-cpu", machine.cpu, "-L", str(machine.root), "-0", str(machine.interpreter)]
    program = base / "usr" / "bin" / machine.interpreter.name
    _write(machine.root / "proc" / "cpuinfo", f"{cores}\nRevision\t: d04170\nModel\t\t: {board}\n")
    _write(machine.interpreter, f'#!/bin/sh\nexec {shlex.join([*emulator, str(program)])} "$@"\n')
    for name in ("lib", "etc", "usr/lib", "usr/share"):
        link = machine.root / name
        if link.is_symlink() and link.readlink() != base / name:  # the cache was moved
            link.unlink()
        if not link.is_symlink():
            link.symlink_to(base / name)


def _write(path: Path, text: str) -> None:
    """Write an executable file in one step, if it is not there with that text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        partial = path.with_name(f".{path.name}-{os.getpid()}")
        partial.write_text(text)
        partial.chmod(0o755)
        partial.rename(path)


# ---- Wheels


def build_wheel(folder: Path) -> Path:
    """The project's wheel, built in `folder` from its files and nothing left of earlier builds."""
    source = folder / "source"
    listed = _run(
        ["git", "-C", str(PROJECT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        "listing the project's files",
    )
    for name in filter(None, listed.split("\0")):
        if not name.startswith(("models/", "tests/")):
            origin, target = PROJECT / name, source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if origin.is_symlink() or origin.is_file():
                shutil.copy2(origin, target, follow_symlinks=False)
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(source))
    return next(folder.glob("gemma_edge-*.whl"))


def install(wheel: Path, python: str, folder: Path) -> list[Path]:
    """The wheel, installed into `folder`, and what it needs, in the cache: both for PYTHONPATH."""
    own = folder / f"site-{python}"
    _pip("install", "--no-deps", "--no-compile", "--target", str(own), str(wheel))
    return [own, needs(wheel, python) / "site"]


def needs(wheel: Path, python: str) -> Path:
    """A folder of what the wheel needs: `wheels`, aarch64 and pure ones only, and `site` made of them."""
    key = hashlib.sha256("\n".join([*requirements(wheel), EXTRAS, python]).encode()).hexdigest()[:12]
    folder = cache_folder() / f"needs-{python}-{key}"

    def make(made: Path) -> None:
        print(f"installing aarch64 wheels for Python {python} into {folder}", file=sys.stderr)
        options = platform_options(python)
        _pip("download", "--dest", str(made / "wheels"), *options, f"{wheel}[{EXTRAS}]")
        for own in (made / "wheels").glob("gemma_edge-*"):  # ours comes fresh each time
            own.unlink()
        wheels = [str(path) for path in sorted((made / "wheels").iterdir())]
        # "download" has heeded the board's Python; "install" of pips before 25 looks at this one's.
        options += ["--ignore-requires-python", "--no-deps", "--no-compile"]
        _pip("install", *options, "--target", str(made / "site"), *wheels)

    return kept_folder(folder, make)


def platform_options(python: str) -> list[str]:
    """pip's options for wheels that run on `python` of a Debian for arm64."""
    names = [f"manylinux_2_{minor}_aarch64" for minor in range(RELEASES[python].glibc_minor, 16, -1)]
    platforms = [f"--platform={name}" for name in [*names, "manylinux2014_aarch64"]]
    return ["--only-binary=:all:", *platforms, f"--python-version={python}", "--implementation=cp"]


def requirements(wheel: Path) -> list[str]:
    """The wheel's Requires-Dist."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    return sorted(re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE))


def _pip(*arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run([*pip, *arguments], "pip (is the package index reachable?)")


def _run(command: Sequence[str], doing: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise Arm64Error(f"{doing}: {Path(command[0]).name} ended with {done.returncode}:\n{tail}")
    return done.stdout


# ---- Memory


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process; if it is emulated, the program's own and the emulator's around it."""

    anonymous_bytes: int
    file_bytes: int
    emulator_bytes: int = 0

    def __str__(self) -> str:
        total, anonymous = self.anonymous_bytes + self.file_bytes, self.anonymous_bytes
        return f"{total >> 20} MiB resident, {anonymous >> 20} anonymous"


def memory(pid: int) -> Memory:
    """What the kernel's list of mappings says; the emulator's own are told from the program's by address.

    qemu puts an arm64 program's memory between 0x40_0000_0000 (mappings) and 0x56_0000_0000 (images, heap).
    Its own image and the mappings that it makes for itself lie far above, past 0x5000_0000_0000.
    """
    emulated = "qemu" in Path(f"/proc/{pid}/exe").resolve().name
    anonymous = file = emulator = 0
    start = rss = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            start = int(header[1], 16)
        elif line.startswith("Rss:"):
            rss = int(line.split()[1]) << 10
        elif line.startswith("Anonymous:"):
            private = int(line.split()[1]) << 10
            if emulated and start >> 40:
                emulator += rss
            else:
                anonymous += private
                file += rss - private
    return Memory(anonymous, file, emulator)


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", choices=RELEASES, default="3.11")
    parser.add_argument("--cpu", choices=CPUINFO, default="cortex-a76")
    parser.add_argument(
        "--check", action="store_true", help="only see whether this machine has what it takes"
    )
    end = given.index("--") if "--" in given else len(given)  # what follows is for Python, whatever it is
    args = parser.parse_args(given[:end])
    try:
        if args.check:
            check_tools()
            return 0
        machine = open_machine(args.python, args.cpu)
        with tempfile.TemporaryDirectory() as scratch:
            site = install(build_wheel(Path(scratch)), args.python, Path(scratch))
            command = machine.command(*given[end + 1 :])
            return subprocess.call(command, env=machine.environment(*site))
    except Arm64Error as error:
        print(f"arm64: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
