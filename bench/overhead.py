"""What everything but the model costs: time around it in a step, CPU of an idle daemon, memory before it.

    python bench/overhead.py BUNDLE [--new-tokens 64] [--idle 20]

A step is timed where a daemon runs it: service, tokenizer, engine and sampler, with the events read by
another thread; what is not inside `run_with_iobinding` counts. The idle daemon serves HTTP on a unix socket,
Wyoming on another, and MQTT if there is a mosquitto. Memory is that of a process that has imported it all,
without a model.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, median, print_json, print_machine
from decode import RunClock
from serve import local_broker

from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.chat import load_template
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.service import ChatRequest, Done, Failed, Service
from gemma_edge.runtime.tokenizer import load_tokenizer

STEP_TARGET, IDLE_TARGET, RSS_TARGET_BYTES = 0.02, 0.005, 80e6
MODULES = ("engine", "service", "chat", "tokenizer", "sounds", "audio.encoder", "serve", "transports.http",
           "transports.mqtt", "transports.wyoming")  # fmt: skip
QUESTION = [{"role": "user", "content": "Say as much as you can about the weather."}]


def step_overhead(bundle: Bundle, new_tokens: int, threads: int | None, repeats: int) -> dict[str, float]:
    """Seconds of a step, and of it outside ONNX Runtime: medians over answers."""
    engine = Engine(bundle, threads=threads)
    engine.eos = frozenset()
    session = engine._session
    clocks = [RunClock(session.decoder), RunClock(session.embeddings)]
    session.decoder, session.embeddings = clocks
    steps, outside = [], []
    with Service(engine, load_tokenizer(bundle), load_template(bundle), model_name=bundle.name) as service:
        for _ in range(repeats + 1):
            job = service.submit(ChatRequest(QUESTION, max_tokens=new_tokens))
            started = inside = 0.0
            for event in job.events():
                if not started:  # the first text: from here on there are steps alone
                    started, inside = time.perf_counter(), sum(clock.spent_s for clock in clocks)
                if isinstance(event, Failed):
                    raise SystemExit(event.message)
                if isinstance(event, Done):
                    break
            took_s, ran = time.perf_counter() - started, engine.last_stats.decode_steps
            steps.append(took_s / ran)
            outside.append((took_s - (sum(clock.spent_s for clock in clocks) - inside)) / ran)
    return {"step_s": median(steps[1:]), "outside_s": median(outside[1:])}


def idle_daemon(bundle: Path, seconds: float) -> tuple[float, bool]:
    """Share of a CPU that a daemon takes with nothing to do; whether MQTT was part of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with local_broker(folder) as port:
            command = [sys.executable, "-m", "gemma_edge.cli", "serve", str(bundle)]
            command += ["--socket", str(folder / "http.sock"), "--wyoming", f"unix://{folder}/wyoming.sock"]
            command += ["--mqtt", f"mqtt://127.0.0.1:{port}"] if port else []
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
                try:
                    assert daemon.stderr is not None
                    for line in daemon.stderr:
                        if line.startswith("ready:"):
                            break
                    else:
                        raise SystemExit("the daemon did not start")
                    time.sleep(10)  # weights move onto huge pages meanwhile
                    before, start = cpu_s(daemon.pid), time.perf_counter()
                    time.sleep(seconds)
                    share = (cpu_s(daemon.pid) - before) / (time.perf_counter() - start)
                finally:
                    daemon.send_signal(signal.SIGTERM)
            return share, bool(port)


def cpu_s(pid: int) -> float:
    """Of the process so far, threads that have ended included; counted in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_before_model() -> int:
    code = "import importlib, sys\n"
    code += "for name in sys.argv[1:]: importlib.import_module('gemma_edge.runtime.' + name)\n"
    code += "from gemma_edge.runtime.stats import memory_use\nprint(memory_use().rss_bytes)"
    done = subprocess.run([sys.executable, "-c", code, *MODULES], check=True, capture_output=True, text=True)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--idle", type=float, default=20.0, metavar="S", help="watch the idle daemon so long")
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    rss_bytes = rss_before_model()
    idle, with_mqtt = idle_daemon(args.bundle, args.idle)
    step = step_overhead(open_bundle(args.bundle), args.new_tokens, args.threads, args.repeats)
    share = step["outside_s"] / step["step_s"]
    print(
        f"a step of {step['step_s'] * 1e3:.2f} ms: {step['outside_s'] * 1e6:.0f} us outside ONNX Runtime, "
        f"{share:.2%} (target {STEP_TARGET:.0%})"
    )
    print(f"idle daemon{' with MQTT' if with_mqtt else ''}: {idle:.2%} of a CPU (target {IDLE_TARGET:.1%})")
    print(f"before the model: {rss_bytes / 1e6:.1f} MB (target {RSS_TARGET_BYTES / 1e6:.0f})")
    print_json(
        {
            "bench": "overhead",
            "bundle": args.bundle.name,
            "step_s": round(step["step_s"], 6),
            "outside_s": round(step["outside_s"], 7),
            "outside_share": round(share, 5),
            "idle_cpu_share": round(idle, 5),
            "mqtt": with_mqtt,
            "rss_before_model_bytes": rss_bytes,
            "targets": {
                "outside_share": STEP_TARGET,
                "idle_cpu_share": IDLE_TARGET,
                "rss_before_model_bytes": RSS_TARGET_BYTES,
            },
            "machine": about,
        }
    )


if __name__ == "__main__":
    main()
