"""LiteRT-LM as a peer: installs it in an environment of its own, makes models for it, runs them.

    python bench/peer_litert.py CHECKPOINT --work DIR [--mixes mix int4]

CHECKPOINT: a Gemma 4 in bfloat16, Google's or made up (`python -m gemma_edge.export.synthetic --model e2b
DIR/checkpoint`). Its text model alone is exported, as {mix}.litertlm in DIR, where bench/peers.py finds it:
"mix" has 2 bits in MLPs and 4 elsewhere, close to the published files, "int4" 4 bits a channel everywhere.
E2B takes 10 minutes on two cores, 16 GiB of memory, most of it pages of files, and 24 GB of disk, of which 5
are the models and 4 the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import measured_process

ROOT = Path(__file__).parents[1]
VERSION = "0.18.1"
RUNTIME = [f"litert-lm=={VERSION}", f"litert-lm-api=={VERSION}"]
# What the exporter was run with; it takes its low-memory way with a TensorFlow as new as this alone.
EXPORTER = [
    *["litert-torch==0.10.0", f"litert-lm-builder=={VERSION}", "litert-converter==0.5.0"],
    *["ai-edge-litert==2.3.0", "ai-edge-quantizer==0.10.0", "tf-nightly==2.23.0.dev20261026"],
    *["torch==2.13.0", "transformers==5.23.0", "torchao==0.18.0"],
]
# Imported always, needed for pictures only, and wants another package's copy of a module.
MENDED = "generative/export_hf/model_ext/bonsai_flux2/bonsai_flux2.py"
WRONG_IMPORT = "from tensorflow.lite.python import schema_py_generated"
RIGHT_IMPORT = "from ai_edge_litert import schema_py_generated"

MIXES = {"mix": "LiteRT-LM 2/4-bit", "int4": "LiteRT-LM int4"}  # file -> name
STAGES = ("embedder", "per_layer_embedder", "decoder", "package")

# Runs in that environment. The prompt is of distinct words: the runtime's own one is one token again and
# again. Caches of packed weights go beside the model, as its command line does it.
PROGRAM = """
import json, random, sys
import litert_lm
model, threads, prompt, new = sys.argv[1], *map(int, sys.argv[2:5])
litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
words = ["".join(random.Random(n).choices("abcdefghijklmnoprstuvw", k=5)) for n in range(prompt + 64)]
run = litert_lm.Benchmark(
    model,
    backend=litert_lm.Backend.CPU(thread_count=threads),
    prefill_tokens=prompt,
    decode_tokens=new,
    prompt=" ".join(words),
    use_ringbuffers_local_attention=True,
).run()
print(json.dumps({
    "prefill_tokens": run.last_prefill_token_count,
    "prefill": run.last_prefill_tokens_per_second,
    "decode": run.last_decode_tokens_per_second,
    "ttft_s": run.time_to_first_token_in_second,
}))
"""


def install(work: Path, packages: list[str], module: str) -> Path:
    """The Python of an environment in `work` that has them."""
    python = work / "litert" / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(work / "litert")], check=True)
    if subprocess.run([str(python), "-c", f"import {module}"], capture_output=True, check=False).returncode:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def install_exporter(work: Path) -> Path:
    python = install(work, RUNTIME, "litert_lm")
    version = next(package.partition("==")[2] for package in EXPORTER if package.startswith("torch=="))
    subprocess.run(["sh", str(ROOT / "tools" / "install_torch.sh"), str(python), version], check=True)
    install(work, EXPORTER, "litert_torch.version, tensorflow")
    for path in (work / "litert" / "lib").glob(f"python*/site-packages/litert_torch/{MENDED}"):
        path.write_text(path.read_text().replace(WRONG_IMPORT, RIGHT_IMPORT))
    return python


def make(checkpoint: Path, work: Path, mixes: list[str]) -> list[Path]:
    """Models in `work`; each stage is a process of its own, at low priority."""
    missing = [mix for mix in mixes if not (work / f"{mix}.litertlm").is_file()]
    if missing:
        work.mkdir(parents=True, exist_ok=True)
        python = install_exporter(work)
        script = str(Path(__file__).with_name("litert_export.py"))
        with tempfile.TemporaryDirectory(dir=work, prefix="litert-") as name:
            out = Path(name) / "parts"
            out.mkdir()
            text = text_only(checkpoint, Path(name) / "checkpoint")
            for stage in STAGES:
                command = ["nice", "-n", "15", str(python), script, str(text), str(out), stage, *missing]
                subprocess.run(command, check=True)
            for mix in missing:
                (out / f"{mix}.litertlm").rename(work / f"{mix}.litertlm")
    return [work / f"{mix}.litertlm" for mix in mixes]


def text_only(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint in a folder of links, with a config that knows of no towers."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config |= {"vision_config": None, "audio_config": None}
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "config.json":
            os.symlink(path.resolve(), folder / path.name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def run(
    python: Path, model: Path, *, threads: int, prompts: list[int], depths: list[int], new: int
) -> dict[str, Any]:
    """Tokens a second of prompts, and of `new` tokens after each depth; and the processes' peak memory."""
    found: dict[str, Any] = {"prefill": {}, "decode": {}, "peak_bytes": 0}
    for prompt in sorted({*prompts, *(max(depth, 1) for depth in depths)}):
        numbers = [str(number) for number in (threads, prompt, new)]
        out, peak_bytes = measured_process([str(python), "-c", PROGRAM, str(model), *numbers])
        line = json.loads(out.splitlines()[-1])
        if prompt in prompts:
            found["prefill"][prompt] = line["prefill"]
        for depth in depths:
            if max(depth, 1) == prompt:
                found["decode"][depth] = line["decode"]
        found["peak_bytes"] = max(found["peak_bytes"], peak_bytes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=[*MIXES])
    args = parser.parse_args()
    for path in make(args.checkpoint, args.work, args.mixes):
        print(f"{path}: {path.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
