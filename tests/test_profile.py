"""Device profiles: the shipped ones are whole and sensible; a mistake in one is an error that says where."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gemma_edge.runtime.detect import markdown_table, resolve_profile
from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.profile import (
    HARDWARE_FIGURES,
    DeviceProfile,
    load_profile,
    load_profiles,
    profiles_folder,
)

PROFILES = load_profiles()
ids = [profile.name for profile in PROFILES]

# Gemma 4 E2B and E4B (config.json): values in the caches per context token, and of the sliding layers in all.
CACHE_VALUES = {
    "google/gemma-4-E2B-it": (3 * 2 * 1 * 512, 12 * 2 * 1 * 256 * 512),
    "google/gemma-4-E4B-it": (4 * 2 * 2 * 512, 20 * 2 * 2 * 256 * 512),
}
# Weights read for one token, 10^9: body and tied head (without the embedding tables, which stay on disk).
WEIGHTS = {"google/gemma-4-E2B-it": 1.88 + 0.40, "google/gemma-4-E4B-it": 3.97 + 0.67}


def test_the_devices_and_aliases_that_the_readme_promises() -> None:
    assert ids == [
        "apple-silicon-16gb",
        "arm-laptop-16gb",
        "jetson-agx-orin-64gb",
        "jetson-orin-nano-8gb",
        "jetson-orin-nx-16gb",
        "jetson-thor",
        "raspberry-pi-4-4gb",
        "raspberry-pi-4-8gb",
        "raspberry-pi-5-16gb",
        "raspberry-pi-5-4gb",
        "raspberry-pi-5-8gb",
        "x86-64-generic",
    ]
    assert load_profile("jetson").name == "jetson-orin-nano-8gb"
    assert load_profile("raspberry-pi").name == "raspberry-pi-5-8gb"
    assert load_profile("arm-laptop").name == "arm-laptop-16gb"


@pytest.mark.parametrize("profile", PROFILES, ids=ids)
def test_every_hardware_figure_has_a_source(profile: DeviceProfile) -> None:
    for figure in HARDWARE_FIGURES:
        assert len(profile.sources[figure]) > 10 or profile.name == "x86-64-generic"


@pytest.mark.parametrize("profile", PROFILES, ids=ids)
def test_int4_of_the_default_model_fits_the_budget(profile: DeviceProfile) -> None:
    """Weights with a 4-byte scale a block, caches at the granted context, and 400 MiB for everything else."""
    bytes_per_weight = (4 + 32 / profile.block_sizes["4"]) / 8
    per_token, sliding = CACHE_VALUES[profile.default_model]
    kv_bytes = (per_token * profile.context + sliding) * (4 if profile.kv_cache.dtype == "float32" else 2)
    need_mib = (WEIGHTS[profile.default_model] * 1e9 * bytes_per_weight + kv_bytes) / 2**20 + 400
    assert need_mib < profile.memory.budget_mib


@pytest.mark.parametrize("profile", PROFILES, ids=ids)
def test_the_budget_fits_the_smallest_machine_that_is_detected(profile: DeviceProfile) -> None:
    if profile.detect.min_memory_mib:
        assert profile.memory.budget_mib <= profile.detect.min_memory_mib - 512  # the system's share
        assert profile.detect.min_memory_mib < profile.memory.total_mib


def test_readme_table_is_in_step_with_the_profiles() -> None:
    readme = (profiles_folder() / "README.md").read_text(encoding="utf-8")
    assert markdown_table(PROFILES) in readme, "run `gemma-edge devices --markdown` and paste it"


def test_readme_describes_every_field() -> None:
    readme = (profiles_folder() / "README.md").read_text(encoding="utf-8")
    for field in DeviceProfile.__struct_fields__:
        assert f"`{field}" in readme, field
    for name, part in DeviceProfile.__annotations__.items():
        for field in _fields_of(part):
            assert f"`{name}.{field}`" in readme, f"{name}.{field}"


def _fields_of(annotation: str) -> tuple[str, ...]:
    from gemma_edge.runtime import profile

    return getattr(getattr(profile, annotation, None), "__struct_fields__", ())


def test_unknown_device_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'raspberry-pi-5-8gb'\?"):
        load_profile("rasberry-pi-5-8gb")
    with pytest.raises(ConfigError, match="Known: auto, apple-silicon-16gb"):
        load_profile("toaster")


def good() -> dict:
    """A valid profile as plain data, to be spoilt."""
    return yaml.safe_load((profiles_folder() / "raspberry-pi-5-8gb.yaml").read_text(encoding="utf-8"))


def write(folder: Path, data: dict, stem: str | None = None) -> Path:
    path = folder / f"{stem or data['name']}.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def spoilt(path: str, value: object) -> dict:
    data = good()
    *parents, last = path.split("/")
    inner = data
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (spoilt("contxt", 1), "`contxt`.*did you mean `context`"),
        (spoilt("memory/budget_mb", 1), r"`budget_mb`.*\$\.memory.*did you mean `budget_mib`"),
        (spoilt("memory/budget_mib", 8192), "budget_mib is 8192, expected under total_mib"),
        (spoilt("memory/bandwidth_gb_s", 0), r"Expected `float` > 0.*bandwidth_gb_s"),
        (spoilt("cpu/threads", 5), "threads is 5, expected at most cores"),
        (spoilt("cpu/arch", "riscv64"), "riscv64"),
        (spoilt("execution_provider", "tpu"), "tpu"),
        (spoilt("execution_provider", "cuda"), "sliding_slack is 64, expected 0 with cuda"),
        (spoilt("kv_cache/dtype", "int4"), "int4"),
        (spoilt("kv_cache/sliding_slack", -1), "Expected `int` >= 0"),
        (spoilt("block_sizes", {"4": 48}), r"block_sizes\[4\] is 48, expected a power of two"),
        (spoilt("block_sizes", {"3": 32}), "block_sizes"),
        (spoilt("context", 0), "Expected `int` >= 1"),
        (spoilt("context", "8k"), "Expected `int`, got `str`"),
        (spoilt("name", "Raspberry Pi"), "matching regex"),
        (
            spoilt("sources", {"cpu.model": "x"}),
            "sources lacks memory.total_mib, memory.bandwidth_gb_s, cpu.cores",
        ),
        (spoilt("detect/systems", ["BeOS"]), "BeOS"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_mistake_in_a_profile_is_named(tmp_path: Path, data: dict, expected: str) -> None:
    path = write(tmp_path, data, "raspberry-pi-5-8gb")
    with pytest.raises(ConfigError, match=expected) as caught:
        load_profile(str(path))
    assert "raspberry-pi-5-8gb.yaml" in str(caught.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    data = good()
    del data["kv_cache"]
    with pytest.raises(ConfigError, match="missing required field `kv_cache`"):
        load_profile(str(write(tmp_path, data)))


def test_a_name_or_alias_taken_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path, spoilt("name", "one"))
    write(tmp_path, spoilt("name", "two"))
    with pytest.raises(ConfigError, match=r"two\.yaml: 'raspberry-pi' already names one"):
        load_profiles(tmp_path)
    data = spoilt("name", "two")
    data["aliases"] = ["one"]
    write(tmp_path, data)
    with pytest.raises(ConfigError, match=r"two\.yaml: 'one' already names one"):
        load_profiles(tmp_path)


def test_the_name_must_be_the_stem(tmp_path: Path) -> None:
    write(tmp_path, good(), "other")
    with pytest.raises(ConfigError, match="expected the file's stem 'other'"):
        load_profiles(tmp_path)


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    data = spoilt("name", "my-board")
    data["aliases"] = []
    path = write(tmp_path, data)
    assert load_profile(str(path)).name == "my-board"
    assert load_profile("my-board", tmp_path).name == "my-board"
    assert resolve_profile("my-board", tmp_path).name == "my-board"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(str(tmp_path / "none.yaml"))
