"""What runs on the device: each package's aarch64 wheel, size, and resident memory once it is imported.

    python -m tools.device_packages [--python 3.11]     # the table of docs/arm64.md; the last line is JSON

Memory is measured on an emulated Raspberry Pi 5 (`tools.arm64`), one process for each package, without the
emulator's own; pages of libraries that were not touched are not in it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from . import arm64

# What is used of packages whose own module imports nothing.
MODULES = {
    "paho_mqtt": "paho.mqtt.client",
    "protobuf": "google.protobuf",
    "starlette": "starlette.applications",
}


@dataclass(frozen=True)
class Package:
    """One package that runs on the device."""

    name: str
    version: str
    extra: str  # that asks for it; "" for all installations, "…" if another package does
    wheel_bytes: int
    installed_bytes: int
    tag: str  # "cp311-cp311-manylinux_2_28_aarch64"
    module: str
    import_bytes: int | None  # resident, over a bare interpreter; None if the import fails …
    failure: str = ""  # … with this


def measure_packages(python: str) -> list[Package]:
    """Every package of the wheel's device extras; each is imported in a process of its own."""
    machine = arm64.open_machine(python)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = arm64.build_wheel(Path(scratch))
        folder = arm64.needs(wheel, python)
        asked = _asked(arm64.requirements(wheel))
        bare, _ = _resident_after(machine, folder / "site", "")
        assert bare is not None
        found = []
        for path in sorted((folder / "wheels").iterdir()):
            name, version, tag = path.stem.split("-", 2)
            module, installed_bytes = _contents(path)
            resident, failure = _resident_after(machine, folder / "site", module)
            found.append(
                Package(
                    name=name,
                    version=version,
                    extra=asked.get(_plain(name), "…"),
                    wheel_bytes=path.stat().st_size,
                    installed_bytes=installed_bytes,
                    tag=tag,
                    module=module,
                    import_bytes=None if resident is None else resident - bare,
                    failure=failure,
                )
            )
            print(f"import {module}: {_mib(found[-1])} MiB {failure}", file=sys.stderr, flush=True)
    return found


def _mib(package: Package) -> str:
    return "–" if package.import_bytes is None else f"{package.import_bytes / 2**20:.1f}"


def _asked(requirements: Sequence[str]) -> dict[str, str]:
    """Package -> the device's extra that asks for it, "" if all installations have it."""
    asked = {}
    for line in requirements:
        extra = re.search(r"""extra == ['"]([^'"]+)""", line)
        if extra is None or extra[1] in arm64.EXTRAS.split(","):
            asked[_plain(re.split(r"[^\w.-]", line)[0])] = extra[1] if extra else ""
    return asked


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _contents(wheel: Path) -> tuple[str, int]:
    """The module that the wheel is imported by, and its size unpacked."""
    with zipfile.ZipFile(wheel) as archive:
        files = archive.infolist()
    names = [info.filename for info in files if info.filename.endswith(".py")]
    tops = {name.split("/")[0].removesuffix(".py") for name in names}
    tops = {top for top in tops if top.isidentifier() and not top.startswith(("_", "test"))}
    name = _plain(wheel.name.split("-")[0]).replace("-", "_")
    module = MODULES.get(name) or (name if name in tops or not tops else min(tops))
    return module, sum(info.file_size for info in files)


def _resident_after(machine: arm64.Machine, site: Path, module: str) -> tuple[int | None, str]:
    """Resident bytes of an interpreter that has imported `module`; or None, and the error."""
    code = f"{f'import {module}' if module else ''}\nprint('ready', flush=True)\ninput()"
    with subprocess.Popen(
        machine.command("-c", code),
        env=machine.environment(site),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            lines = process.communicate()[1].strip().splitlines()
            return None, lines[-1] if lines else f"ended with {process.returncode}"
        used = arm64.memory(process.pid)
        process.communicate("\n")
    return used.anonymous_bytes + used.file_bytes, ""


def _short(tag: str) -> str:
    """Of several platforms the newest."""
    python, abi, platforms = tag.split("-")
    return f"{python}-{abi}-{platforms.split('.')[-1]}"


def table(packages: Sequence[Package]) -> str:
    """In Markdown."""
    lines = [
        "| package | version | extra | wheel | MB | installed MB | import MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for package in packages:
        cells = [
            package.name,
            package.version,
            package.extra,
            f"`{_short(package.tag)}`",
            f"{package.wheel_bytes / 1e6:.2f}",
            f"{package.installed_bytes / 1e6:.1f}",
            _mib(package),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", choices=arm64.RELEASES, default="3.11")
    try:
        packages = measure_packages(parser.parse_args().python)
    except arm64.Arm64Error as error:
        print(f"device_packages: {error}", file=sys.stderr)
        return 1
    print(table(packages))
    print(json.dumps([asdict(package) for package in packages]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
