"""A device profile: what the device fixes. Reads the YAML files of `device_profiles/`, strictly.

Knows the files' schema and aliases; not how a profile is used.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from .bundle import KvDtype, Struct
from .errors import ConfigError
from .strict import decode_yaml_file

Positive = Annotated[int, msgspec.Meta(gt=0)]


class ProfileMemory(Struct):
    """Memory of the device, in MiB."""

    total_mib: Positive
    budget_mib: Positive  # what gemma-edge may take: the rest is the system's and the application's


class ProfileCpu(Struct):
    """Processor of the device."""

    arch: Literal["aarch64", "x86_64", "arm64"]
    model: str
    cores: Positive
    threads: Positive  # for the engine; big cores only, where cores differ


class ProfileKvCache(Struct):
    """Key/value caches."""

    dtype: KvDtype
    sliding_slack: Annotated[int, msgspec.Meta(ge=0)]  # tokens above the window; CUDA needs 0


class ProfileDetect(Struct):
    """How the device is recognised. Every list that is given must match; an empty one matches anything."""

    device_tree_models: tuple[str, ...] = ()  # substrings of /proc/device-tree/model
    cpu_features: tuple[str, ...] = ()  # all in /proc/cpuinfo (Linux)
    systems: tuple[Literal["Linux", "Darwin"], ...] = ("Linux",)
    machines: tuple[str, ...] = ()  # platform.machine()
    min_memory_mib: int = 0


class DeviceProfile(Struct):
    """One device. `name` is the file's stem."""

    name: str
    title: str
    memory: ProfileMemory
    cpu: ProfileCpu
    execution_provider: Literal["cpu", "cuda"]
    context: Positive  # tokens granted to the full-attention caches by default
    kv_cache: ProfileKvCache
    prefill_chunk: Positive  # tokens
    block_sizes: dict[str, Positive]  # bits ("4", "8") -> weights that share a scale
    default_model: str  # Hub id
    default_recipe: str
    sources: dict[str, str]  # field or fact -> where the figure is from
    aliases: tuple[str, ...] = ()
    detect: ProfileDetect = ProfileDetect()


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
                raise ConfigError(f"{path}: {word!r} already names {taken[word]}")
            taken[word] = profile.name
        profiles.append(profile)
    return profiles


def load_profile(name: str, folder: Path | None = None) -> DeviceProfile:
    """The profile called `name` (or aliased to it), or the one in the file `name` if that is a YAML path.

    Raises ConfigError naming the known devices.
    """
    if name.endswith((".yaml", ".yml")):
        return decode_yaml_file(Path(name), DeviceProfile)
    profiles = load_profiles(folder)
    for profile in profiles:
        if name == profile.name or name in profile.aliases:
            return profile
    known = ", ".join(sorted(word for p in profiles for word in (p.name, *p.aliases)))
    raise ConfigError(f"no device profile {name!r}; known: {known}")
