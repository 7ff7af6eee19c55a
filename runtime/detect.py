"""Which profile fits a machine, and the `devices` command that lists and detects. Knows no engine."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .errors import ConfigError
from .machine import Machine, read_machine
from .profile import DeviceProfile, load_profile, load_profiles

__all__ = [
    "Detection",
    "Machine",
    "add_devices_arguments",
    "detect",
    "read_machine",
    "resolve_profile",
    "run_devices",
]

log = logging.getLogger(__name__)

AUTO = "auto"
FIRST_CUDA_JETSON_RELEASE = 38  # JetPack 7: CUDA 13 and Python 3.12
ROUNDING = 0.85  # systems report less memory than the board has, by up to this factor


@dataclass(frozen=True)
class Detection:
    """The profile that fits, why it does, and what is worth knowing about this very machine."""

    profile: DeviceProfile
    reasons: tuple[str, ...]
    notes: tuple[str, ...]


def resolve_profile(name: str, folder: Path | None = None) -> DeviceProfile:
    """The profile called `name`; "auto" detects this machine's and logs which and why. Raises ConfigError."""
    if name != AUTO:
        return load_profile(name, folder)
    detection = detect(read_machine(), load_profiles(folder))
    log.info("device %s: %s", detection.profile.name, "; ".join(detection.reasons))
    for note in detection.notes:
        log.warning("%s", note)
    return detection.profile


def detect(machine: Machine, profiles: Sequence[DeviceProfile]) -> Detection:
    """The profile that fits `machine` best: one that names it before one that takes any, then by memory.

    Raises ConfigError saying what was seen and what to use instead.
    """
    if machine.system not in ("Linux", "Darwin"):
        raise ConfigError(
            f"gemma-edge runs on Linux and macOS, this is {machine.system or 'an unknown system'}; "
            "on Windows use WSL 2"
        )
    if machine.machine.startswith(("armv", "i386", "i586", "i686")):
        raise ConfigError(
            f"this is a 32-bit system ({machine.machine}), expected a 64-bit one: onnxruntime has no 32-bit "
            "builds; install a 64-bit operating system"
        )
    identified = [(profile, reason) for profile in profiles if (reason := _identify(profile, machine))]
    fitting = [(profile, reason) for profile, reason in identified if _enough_memory(profile, machine)]
    if not fitting:
        raise ConfigError(_no_match(machine, profiles, [profile for profile, _ in identified]))
    best = max(_rank(profile, machine) for profile, _ in fitting)
    winners = [(profile, reason) for profile, reason in fitting if _rank(profile, machine) == best]
    if len(winners) > 1:
        names = ", ".join(profile.name for profile, _ in winners)
        raise ConfigError(f"several profiles fit equally ({names}). Seen: {machine.describe()}. Name one")
    profile, reason = winners[0]
    memory = (
        f"{machine.memory_mib:,} MiB of memory"
        if machine.memory_mib
        else "memory unknown: the smallest taken"
    )
    return Detection(profile, (reason, memory), tuple(_notes(profile, machine)))


def _identify(profile: DeviceProfile, machine: Machine) -> str | None:
    """Why `machine` is the device of `profile`, memory apart; None if it is not."""
    wanted = profile.detect
    if machine.system not in wanted.systems:
        return None
    if wanted.machines and machine.machine not in wanted.machines:
        return None
    if any(word in machine.device_tree_model for word in wanted.device_tree):
        return f"device-tree model {machine.device_tree_model!r}"
    for compatible in machine.device_tree_compatible:
        if any(word in compatible for word in wanted.device_tree):
            return f"device tree compatible with {compatible!r}"
    for word in wanted.cpus:
        for cpu in machine.cpus:
            if word in cpu:
                return f"CPU {cpu!r}"
    if wanted.tegra and machine.tegra_release and not machine.device_tree_compatible:
        return f"a Jetson by /etc/nv_tegra_release ({machine.tegra_release.split(',')[0]})"
    if _names_a_device(profile):
        return None
    return f"{machine.system} {machine.machine}, no closer profile"


def _names_a_device(profile: DeviceProfile) -> bool:
    return bool(profile.detect.device_tree or profile.detect.cpus or profile.detect.tegra)


def _enough_memory(profile: DeviceProfile, machine: Machine) -> bool:
    return machine.memory_mib is None or machine.memory_mib >= profile.detect.min_memory_mib


def _rank(profile: DeviceProfile, machine: Machine) -> tuple[bool, int]:
    memory_mib = profile.detect.min_memory_mib
    return _names_a_device(profile), memory_mib if machine.memory_mib is not None else -memory_mib


def _notes(profile: DeviceProfile, machine: Machine) -> list[str]:
    notes = []
    missing = [feature for feature in profile.cpu.features if feature not in machine.cpu_features]
    if missing and machine.cpu_features:
        notes.append(
            f"the CPU lacks {', '.join(missing)}, which onnxruntime's fast kernels need: expect it slow"
        )
    if machine.memory_mib and machine.memory_mib < ROUNDING * profile.memory.total_mib:
        notes.append(
            f"{machine.memory_mib:,} MiB of memory, the profile assumes {profile.memory.total_mib:,}: "
            f"its budget of {profile.memory.budget_mib:,} MiB may be too large here"
        )
    if machine.cores and machine.cores < profile.cpu.threads:
        notes.append(
            f"{machine.cores} cores, fewer than the profile's threads: the engine takes {machine.cores}"
        )
    release = machine.tegra_major
    if profile.execution_provider == "cuda" and release is not None and release < FIRST_CUDA_JETSON_RELEASE:
        notes.append(
            f"Jetson Linux R{release}: CUDA needs R{FIRST_CUDA_JETSON_RELEASE} (JetPack 7) or later; "
            "upgrade, or export for a profile with execution_provider: cpu (docs/devices.md)"
        )
    return notes


def _no_match(machine: Machine, profiles: Sequence[DeviceProfile], too_large: Sequence[DeviceProfile]) -> str:
    parts = [f"no device profile fits this machine. Seen: {machine.describe()}."]
    if too_large:
        least = min(too_large, key=lambda profile: profile.detect.min_memory_mib)
        parts.append(f"{least.name} is this device with {least.detect.min_memory_mib:,} MiB or more.")
    near = _nearest(machine, profiles)
    if near:
        parts.append(f"Nearest: {near.name} ({near.title}); use it with --device {near.name},")
        parts.append("or write a profile: docs/devices.md")
    else:
        parts.append("No profile is near; write one: docs/devices.md")
    return " ".join(parts)


def _nearest(machine: Machine, profiles: Sequence[DeviceProfile]) -> DeviceProfile | None:
    """The largest profile of the same architecture whose budget fits, the most CPU features in common."""
    arm = ("aarch64", "arm64")
    same = [
        profile
        for profile in profiles
        if (profile.cpu.arch in arm) == (machine.machine in arm)
        and (machine.is_tegra or profile.execution_provider == "cpu")
        and (machine.memory_mib is None or profile.memory.budget_mib < machine.memory_mib)
    ]

    def closeness(profile: DeviceProfile) -> tuple[bool, bool, int, int]:
        features = set(profile.cpu.features)
        return (
            machine.is_tegra and profile.execution_provider == "cuda",
            features <= machine.cpu_features,
            profile.memory.total_mib,
            len(features),
        )

    return max(same, key=closeness, default=None)


def add_devices_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gemma-edge devices`."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--detect", action="store_true", help="pick the profile of this machine and say why")
    what.add_argument("--markdown", action="store_true", help="the table of device_profiles/README.md")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_devices(args: argparse.Namespace) -> int:
    """`gemma-edge devices`: list the profiles, or detect this machine's."""
    profiles = load_profiles()
    if args.detect:
        print(_detection_text(detect(read_machine(), profiles), as_json=args.json))
    elif args.json:
        print(_json([msgspec.to_builtins(profile) for profile in profiles]))
    elif args.markdown:
        print(markdown_table(profiles))
    else:
        print(text_table(profiles))
    return 0


def _detection_text(detection: Detection, *, as_json: bool) -> str:
    if as_json:
        return _json(
            {
                "device": detection.profile.name,
                "reasons": detection.reasons,
                "notes": detection.notes,
                "profile": msgspec.to_builtins(detection.profile),
            }
        )
    lines = [
        detection.profile.name,
        f"  {detection.profile.title}",
    ]  # the name alone on its line, for scripts
    lines += [f"  because: {reason}" for reason in detection.reasons]
    lines += [f"  note: {note}" for note in detection.notes]
    return "\n".join(lines)


def _json(data: object) -> str:
    return msgspec.json.format(msgspec.json.encode(data), indent=2).decode()


def text_table(profiles: Sequence[DeviceProfile]) -> str:
    """The profiles as aligned columns."""
    rows = [("DEVICE", "ALIAS", "BUDGET", "EP", "CONTEXT", "MODEL", "RECIPE", "TITLE")]
    rows += [
        (
            p.name,
            ", ".join(p.aliases) or "-",
            f"{p.memory.budget_mib} MiB",
            p.execution_provider,
            str(p.context),
            p.default_model,
            p.default_recipe,
            p.title,
        )
        for p in profiles
    ]
    right = (2, 4)  # numbers
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown_table(profiles: Sequence[DeviceProfile]) -> str:
    """The profiles as the table of device_profiles/README.md."""
    lines = [
        "| device | aliases | memory, budget (MiB) | bandwidth (GB/s) | processor, threads | runs on "
        "| context | model | recipe |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in profiles:
        aliases = ", ".join(f"`{alias}`" for alias in p.aliases)
        lines.append(
            f"| [`{p.name}`]({p.name}.yaml) | {aliases} | {p.memory.total_mib:,}, {p.memory.budget_mib:,} "
            f"| {p.memory.bandwidth_gb_s:g} | {p.cpu.model}, {p.cpu.threads} | {p.execution_provider} "
            f"| {p.context:,} | {p.default_model} | {p.default_recipe} |"
        )
    return "\n".join(lines)
