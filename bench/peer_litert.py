"""LiteRT-LM as a peer: installs the runtime in an environment of its own, runs it (for bench/peers.py).

It takes a model file; this module makes none. Exporting E2B with litert-torch takes 22.7 GiB of memory
and half an hour (docs/performance.md says how), and the published files need an account.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

VERSION = "0.18.1"
PACKAGES = [f"litert-lm=={VERSION}", f"litert-lm-api=={VERSION}"]

# Runs in that environment. The prompt is of distinct words: the runtime's own one is one token again and
# again.
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
).run()
print(json.dumps({
    "prefill_tokens": run.last_prefill_token_count,
    "prefill": run.last_prefill_tokens_per_second,
    "decode": run.last_decode_tokens_per_second,
    "ttft_s": run.time_to_first_token_in_second,
}))
"""


def install(work: Path) -> Path:
    """The Python of an environment in `work` that has the runtime."""
    python = work / "litert" / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(work / "litert")], check=True)
    if subprocess.run([str(python), "-c", "import litert_lm"], capture_output=True, check=False).returncode:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def run(python: Path, model: Path, *, threads: int, prompt: int, new: int) -> dict[str, Any]:
    """Tokens a second of a prompt and of `new` tokens after it: {"prefill": {…}, "decode": {…}}."""
    numbers = [str(number) for number in (threads, prompt, new)]
    out = subprocess.run(
        [str(python), "-c", PROGRAM, str(model), *numbers], check=True, capture_output=True, text=True
    ).stdout
    found = json.loads(out.splitlines()[-1])
    return {"prefill": {prompt: found["prefill"]}, "decode": {prompt: found["decode"]}}
