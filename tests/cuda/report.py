"""Runs every check on the GPU and writes one report: `make test-cuda`.

    python -m tests.cuda.report [--cases FOLDER] [--out REPORT.md]

Without a GPU it says so, passes nothing and exits with status 3. Cases that are not there are made first,
which takes minutes and needs torch and transformers. Each check runs whatever became of the others. The
report is Markdown; beside it lies the same as JSON. Exit status 1: a check failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NO_GPU = 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", type=Path, default=ROOT / ".cuda" / "cases", help="made if it is not there"
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".cuda" / "report.md")
    parser.add_argument("--only", help="checks whose name has this in it")
    parser.add_argument(
        "--try-on-cpu", action="store_true", help="run the checks without a GPU, to test them; proves nothing"
    )
    args = parser.parse_args(arguments)
    missing = None if args.try_on_cpu else what_is_missing()
    if missing:
        print(f"no CUDA checks were run and none passed: {missing}", file=sys.stderr)
        return NO_GPU
    if not (args.cases / "nano" / "answers.json").is_file():
        from .cases import prepare

        print(f"making the cases in {args.cases}", flush=True)
        prepare(args.cases)
    from .checks import Place, all_checks

    place = Place(args.cases, "cpu" if args.try_on_cpu else "cuda")
    results: list[dict[str, Any]] = []
    for name, check in all_checks().items():
        if args.only and args.only not in name:
            continue
        start = time.perf_counter()
        result: dict[str, Any] = {"check": name}
        try:
            result |= {"passed": True, "figures": check(place)}
        except Exception as error:  # whatever a GPU's libraries raise is a result
            where = traceback.format_exc(limit=-6)
            result |= {"passed": False, "error": f"{type(error).__name__}: {error}", "traceback": where}
        result["seconds"] = round(time.perf_counter() - start, 2)
        results.append(result)
        print(
            f"{'ok    ' if result['passed'] else 'FAILED'} {result['seconds']:6.1f} s  {name}  "
            f"{result.get('error', '')[:400]}",
            flush=True,
        )
    about = machine()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(markdown(about, results, on_gpu=not args.try_on_cpu), encoding="utf-8")
    args.out.with_suffix(".json").write_text(
        json.dumps(dict(about=about, results=results), indent=1, default=str)
    )
    failed = sum(not result["passed"] for result in results)
    print(f"{len(results) - failed} passed, {failed} failed; {args.out}")
    return 1 if failed or not results else 0


def what_is_missing() -> str | None:
    """Why nothing can be run here."""
    try:
        import onnxruntime as ort
    except ImportError:
        return "onnxruntime is not installed; pip install onnxruntime-gpu"
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return (
            f"this onnxruntime ({ort.__version__}) has only {ort.get_available_providers()}; "
            "install onnxruntime-gpu instead, on a machine with an NVIDIA GPU"
        )
    if not gpus():
        return "nvidia-smi finds no GPU; run this on a machine with an NVIDIA GPU and its driver"
    return None


def gpus() -> str:
    """Names and drivers, as nvidia-smi says; Jetsons have none that says so, but their release file."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except OSError:
        found = ""
    if not found and (release := Path("/etc/nv_tegra_release")).is_file():
        found = release.read_text().split("\n")[0]
    return found


def machine() -> dict[str, str]:
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "GPU": gpus() or "none",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    for package in ("onnxruntime-gpu", "onnxruntime", "numpy", "torch", "transformers"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            continue
    return about


def markdown(about: dict[str, str], results: list[dict[str, Any]], *, on_gpu: bool) -> str:
    lines = ["# CUDA report" if on_gpu else "# Not a CUDA report: the checks were tried on the CPU", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    failed = sum(not result["passed"] for result in results)
    lines += ["", f"{len(results) - failed} of {len(results)} checks passed.", ""]
    lines += ["| check | passed | s | figures |", "|---|---|---|---|"]
    for result in results:
        figures = result.get("figures") or {"error": result.get("error")}
        text = ", ".join(
            f"{key} {_short(value)}"
            for key, value in figures.items()
            if key not in ("operators", "differing")
        )
        passed = "yes" if result["passed"] else "**no**"
        lines.append(f"| {result['check']} | {passed} | {result['seconds']} | {text.replace('|', '/')} |")
    lines += ["", "## What was asked", ""]
    from . import checks

    lines += [(checks.__doc__ or "").strip()]
    for result in results:
        if not result["passed"]:
            lines += ["", f"## {result['check']}", "```", result["traceback"].strip(), "```"]
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)[:200].replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
