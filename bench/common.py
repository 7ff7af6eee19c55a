"""What every benchmark prints: the machine, the versions, medians, and one line of JSON at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gemma_edge.runtime.bundle import MANIFEST, Bundle, open_bundle

PACKAGES = ("gemma-edge", "onnxruntime", "numpy", "sentencepiece")
ERROR_CHARACTERS = 4000  # of a failed process, its last ones
ORT_PACKAGES = ("onnxruntime-gpu", "onnxruntime")  # both import as onnxruntime


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, system, versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("model name", "Model")):
                cpu = line.split(":", 1)[1].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES} | {"onnxruntime": onnxruntime_version()},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def onnxruntime_version() -> str:
    """Of the one that is imported, and its distribution: metadata may speak of another."""
    import onnxruntime

    names = [name for name in ORT_PACKAGES if _version(name) == onnxruntime.__version__]
    return f"{onnxruntime.__version__} ({' or '.join(names) or 'distribution unknown'})"


def print_machine(about: dict[str, Any]) -> None:
    """The machine, for people."""
    print(f"{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, {about['system']}")
    print(f"python {about['python']}, " + ", ".join(f"{name} {v}" for name, v in about["versions"].items()))


def median(values: list[float]) -> float:
    return statistics.median(values)


def read_bandwidth_bytes_per_s(threads: int, size_bytes: int = 512 * 2**20, repeats: int = 3) -> float:
    """How fast `threads` threads read memory together: the best pass over an array larger than caches."""
    parts = np.array_split(np.ones(size_bytes // 8, np.int64), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, size_bytes / (time.perf_counter() - start))
    return best


def measured_process(command: list[str]) -> tuple[str, int]:
    """What a command prints, and the most memory that it had resident, in bytes; its failure is an error."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=out, stderr=errors) as child:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, errors):
            file.seek(0)
        if child.returncode:
            raise SystemExit(
                f"{' '.join(command)}: status {child.returncode}\n{errors.read()[-ERROR_CHARACTERS:]}"
            )
        return out.read(), usage.ru_maxrss * 1024


def with_whole_decoder(bundle: Bundle, folder: Path) -> Bundle:
    """The same bundle on decoder.onnx: its files under other names, and another manifest."""
    folder.mkdir()
    for name in bundle.manifest.files:
        os.link(bundle.path / name, folder / name)
    manifest = msgspec.structs.replace(bundle.manifest, decoder_parts=())
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return open_bundle(folder)


def print_json(result: dict[str, Any]) -> None:
    """The last line, for programs."""
    print(json.dumps(result, separators=(",", ":")))


if __name__ == "__main__":
    print_machine(machine())
