"""A device profile: what the device fixes. Reads the YAML files of `device_profiles/`, strictly.

Knows the files' schema and aliases; not how a profile is used. Every field is described in
device_profiles/README.md.
"""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from .bundle import KvDtype, PrefillWeights, PrepareWhen, Residency, Struct
from .errors import ConfigError
from .strict import decode_yaml_file

Positive = Annotated[int, msgspec.Meta(gt=0)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Bits = Literal["2", "4", "8"]

# Every profile says where these figures are from.
HARDWARE_FIGURES = ("memory.total_mib", "memory.bandwidth_gb_s", "cpu.model", "cpu.cores")


class ProfileMemory(Struct, frozen=True):
    """Memory of the device, in MiB."""

    total_mib: Positive  # nominal: what the vendor sells, not what /proc/meminfo reports
    budget_mib: Positive  # what gemma-edge may take: the rest is the system's and the application's
    bandwidth_gb_s: Annotated[float, msgspec.Meta(gt=0)]  # peak, 10^9 bytes/s; bounds the decode speed

    def __post_init__(self) -> None:
        if self.budget_mib >= self.total_mib:
            raise ValueError(f"budget_mib is {self.budget_mib}, expected under total_mib ({self.total_mib})")


class ProfileCpu(Struct, frozen=True):
    """Processor of the device."""

    arch: Literal["aarch64", "x86_64", "arm64"]  # as `uname -m` says; arm64 is macOS's word
    model: str
    cores: Positive
    threads: Positive  # for the engine; big cores only, where cores differ
    features: tuple[str, ...] = ()  # /proc/cpuinfo features that the fast kernels need

    def __post_init__(self) -> None:
        if self.threads > self.cores:
            raise ValueError(f"threads is {self.threads}, expected at most cores ({self.cores})")


class ProfileKvCache(Struct, frozen=True):
    """Key/value caches."""

    dtype: KvDtype
    sliding_slack: NotNegative  # tokens above the window; CUDA needs 0


class ProfileStart(Struct, frozen=True):
    """How weights come into memory."""

    prepare: PrepareWhen = "by-hand"  # weights are packed by `gemma-edge prepare`, or at the first start
    residency: Residency = "map"  # of packed weights: paged in when needed, at the start, or for good


class ProfileDetect(Struct, frozen=True):
    """How the device is recognised.

    `device_tree`, `cpus` and `tegra` identify it: where any of the three is given, one of them must match.
    `systems`, `machines` and `min_memory_mib` must all match.
    """

    device_tree: tuple[str, ...] = ()  # found in /proc/device-tree/model or in one of its `compatible` words
    cpus: tuple[str, ...] = ()  # found in a CPU's name, or its "implementer:part" in /proc/cpuinfo
    tegra: bool = False  # /etc/nv_tegra_release identifies it where no device tree can be read (containers)
    systems: tuple[Literal["Linux", "Darwin"], ...] = ("Linux",)
    machines: tuple[str, ...] = ()  # platform.machine(); empty matches any
    min_memory_mib: NotNegative = 0  # as the system reports it, which is less than nominal


class DeviceProfile(Struct, frozen=True):
    """One device. `name` is the file's stem."""

    name: Name
    title: str
    memory: ProfileMemory
    cpu: ProfileCpu
    execution_provider: Literal["cpu", "cuda"]
    context: Positive  # tokens granted to the full-attention caches by default
    kv_cache: ProfileKvCache
    prefill_chunk: Positive  # tokens
    block_sizes: dict[Bits, Positive]  # bits -> weights that share a scale
    default_model: str  # Hub id
    default_recipe: str
    sources: dict[str, str]  # field or fact -> where the figure is from
    aliases: tuple[Name, ...] = ()
    prefill_weights: PrefillWeights = "shared"  # what prompts are multiplied with
    start: ProfileStart = ProfileStart()
    detect: ProfileDetect = ProfileDetect()

    def __post_init__(self) -> None:
        if self.execution_provider == "cuda" and self.prefill_weights != "shared":
            raise ValueError(f"prefill_weights is {self.prefill_weights}, expected shared with cuda")
        if self.execution_provider == "cuda" and self.kv_cache.sliding_slack:
            raise ValueError(f"kv_cache.sliding_slack is {self.kv_cache.sliding_slack}, expected 0 with cuda")
        for bits, block in self.block_sizes.items():
            if block < 16 or block & (block - 1):  # what MatMulNBits takes
                raise ValueError(f"block_sizes[{bits}] is {block}, expected a power of two from 16 up")
        missing = [figure for figure in HARDWARE_FIGURES if not self.sources.get(figure, "").strip()]
        if missing:
            raise ValueError(f"sources lacks {', '.join(missing)}: say where each hardware figure is from")


def profiles_folder() -> Path:
    """Where the profiles that ship with the package are."""
    return Path(str(resources.files("gemma_edge.device_profiles")))


def load_profiles(folder: Path | None = None) -> list[DeviceProfile]:
    """All profiles in `folder` (default: the shipped ones), sorted by name. Raises ConfigError."""
    profiles: list[DeviceProfile] = []
    taken: dict[str, str] = {}
    for path in sorted((folder or profiles_folder()).glob("*.yaml")):
        profile = decode_yaml_file(path, DeviceProfile)
        if profile.name != path.stem:
            raise ConfigError(f"{path}: name is {profile.name!r}, expected the file's stem {path.stem!r}")
        for word in (profile.name, *profile.aliases):
            if word in taken:
                raise ConfigError(f"{path}: {word!r} already names {taken[word]}; choose another")
            taken[word] = profile.name
        profiles.append(profile)
    return profiles


def load_profile(name: str, folder: Path | None = None) -> DeviceProfile:
    """The profile called `name` (or aliased to it), or the one in the file `name` if that is a YAML path.

    Knows no "auto": that is `detect.resolve_profile`. Raises ConfigError naming the known devices.
    """
    if name.endswith((".yaml", ".yml")):
        return decode_yaml_file(Path(name), DeviceProfile)
    profiles = load_profiles(folder)
    for profile in profiles:
        if name == profile.name or name in profile.aliases:
            return profile
    known = sorted(word for p in profiles for word in (p.name, *p.aliases))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"no device profile {name!r}; {hint}Known: auto, {', '.join(known)}")
