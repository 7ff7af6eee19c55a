"""All targets of speed and memory in one table, measured: what `make bench` prints.

    python bench/targets.py BUNDLE [BUNDLE ...] [--peers DIR] [--results FILE] [--only RUN ...]

Runs the other scripts, each in a process of its own, and reads the last line of each, which is JSON. Bundles
go by their recipe: of a full-size model (E2B or E4B) an `int4` and a `qat-mobile` one are wanted; one of the
nano model is enough for what does not depend on size, and is exported here if none is given. --peers is the
folder of bench/peers.py, with llama.cpp and LiteRT-LM's models. With --results lines are kept in FILE as
they come, and what is there is not run again. E2B takes an hour. The last line is JSON; the status is 1
if a script failed, whatever targets were missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, print_json, print_machine

from gemma_edge.export.sizes import MODELS, model_of
from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.errors import BundleError

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "models" / "nano"
LIMIT_S = 3600.0  # of one script
PACKED = ", packed"  # of a name in bench/peers.py's line
LITERT_MIX, LITERT_INT4, LLAMA = "LiteRT-LM 2/4-bit", "LiteRT-LM int4", "llama.cpp"

Line = dict[str, Any]  # the last one of a script

# Words in braces stand for bundles and folders: {int4} and {qat-mobile} of a full-size model, {full} all of
# these, {nano}, {any} the first bundle of all, {peers}. A script runs if all that it names are there.
RUNS: dict[str, list[str]] = {
    "decode": ["decode.py", "{int4}", "--repeats", "3"],
    "peers": ["peers.py", "{full}", "--work", "{peers}"],
    "prefill": ["prefill.py", "{int4}", "--tokens", "1024", "4096", "16384", "--repeats", "3"],
    "start": ["start.py", "{int4}"],
    "start-qat": ["start.py", "{qat-mobile}"],
    "kv": ["kv.py"],
    "reuse": ["reuse.py", "{any}", "--repeats", "3"],
    "speculation": ["speculation.py", "{nano}"],
    "speculation-wrong": ["speculation.py", "{nano}", "--wrong"],
    "speculation-full": "speculation.py {nano} --replay {int4} --prompts 8 --repeats 1".split(),
    "speculation-warm": "speculation.py {nano} --replay {int4} --prompts 8 --repeats 1 --taught 100".split(),
    # What E2B's passes took on a Xeon (docs/performance.md): the same figure on every machine.
    "speculation-xeon": "speculation.py {nano} --repeats 5 --steps 2:1.08 3:1.29 4:1.48 5:1.7 9:2.54".split(),
    "tokenizer": ["tokenizer.py", "--download", "--texts", "100000"],
    "overhead": ["overhead.py", "{any}"],
}
WANTED = {
    "int4": "a full-size int4 bundle",
    "qat-mobile": "a full-size qat-mobile bundle",
    "full": "a full-size bundle",
    "nano": "a bundle of the nano model",
    "any": "a bundle",
    "peers": "a folder of peers",
}


@dataclass(frozen=True)
class Goal:
    """One row: a figure of a script's line, and what it is held against."""

    part: str
    what: str
    run: str
    value: Callable[[Line], float | None]  # None: not in this line, because of `without`
    target: float | Callable[[Line], float | None] | None  # None: a figure without one
    sense: str = ">="
    form: str = "{:.2f}"
    scale: float = 1.0
    needs: str | None = None  # one of WANTED beside what the script takes
    without: str = "not in the script's results"


def against(recipe: str, peer: str, *keys: str | int, packed: bool = False) -> Callable[[Line], float | None]:
    """Our bundle of a recipe to a peer, in bench/peers.py's line. packed: with packed weights mapped."""

    def value(line: Line) -> float | None:
        name = ours(line, recipe, packed=packed)
        found = None if name is None else line["against"][name].get(peer)
        for key in keys:
            found = None if found is None else found[str(key)]
        return found

    return value


def ours(line: Line, recipe: str, *, packed: bool = False) -> str | None:
    """The name of our bundle of a recipe in that line."""
    names = (name for name, found in line["recipes"].items() if found == recipe)
    return next((name for name in names if name.endswith(PACKED) == packed), None)


def figure(name: str) -> Callable[[Line], float | None]:
    return lambda line: line[name]


def row(rows: list[Line], **wanted: Any) -> Line | None:
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def share(depth: int) -> Callable[[Line], float | None]:
    return lambda line: (row(line["depths"], depth=depth) or {}).get("share_of_bandwidth")


def peers_share(recipe: str, depth: int) -> Callable[[Line], float | None]:
    """Of the bandwidth, in bench/peers.py's line."""

    def value(line: Line) -> float | None:
        name = ours(line, recipe)
        return None if name is None else line["share_of_bandwidth"][name][str(depth)]

    return value


def longer(tokens: int) -> Callable[[Line], float | None]:
    """Prompt speed at a length to that at 1,024, on the faster graph of the bundle."""

    def value(line: Line) -> float | None:
        path = "graph" if row(line["rows"], path="graph") else "decoder"
        short, long = (row(line["rows"], path=path, tokens=count) for count in (1024, tokens))
        return None if short is None or long is None else long["tok_s"] / short["tok_s"]

    return value


def packed(figure: str) -> Callable[[Line], float | None]:
    return lambda line: (row(line["rows"], start="packed, map") or {}).get(figure)


def limit(figure: str) -> Callable[[Line], float | None]:
    """A target that the script itself works out."""
    return lambda line: line["targets"].get(figure)


NO_LITERT = "no model of LiteRT-LM in the folder of peers (bench/peer_litert.py makes them)"
SHORT = "the bundle's context is shorter"
TIMES, PERCENT, MB = "{:.2f} times", "{:.1%}", ("{:.0f} MB", 1e-6)
QAT = "qat-mobile"
# fmt: off
DECODE = [
    goal for depth in (0, 1024) for goal in (
        Goal("decode", f"int4 to llama.cpp's Q4_0, depth {depth}", "peers",
             against("int4", LLAMA, "decode", depth), 1.0, form=TIMES),
        Goal("decode", f"int4 to LiteRT-LM's int4, depth {depth}", "peers",
             against("int4", LITERT_INT4, "decode", depth), None, form=TIMES, without=NO_LITERT),
        Goal("decode", f"qat-mobile to LiteRT-LM's 2 and 4 bits, depth {depth}", "peers",
             against(QAT, LITERT_MIX, "decode", depth), 1.5, form=TIMES, needs=QAT, without=NO_LITERT),
        Goal("decode", f"int4, of the memory's bandwidth, depth {depth}", "decode",
             share(depth), 0.75, form=PERCENT),
        Goal("decode", f"qat-mobile, of the memory's bandwidth, depth {depth}", "peers",
             peers_share(QAT, depth), None, form=PERCENT, needs=QAT),
    )
]
PREFILL = [
    Goal("prefill", "int4 to LiteRT-LM's int4, 1,024 tokens", "peers",
         against("int4", LITERT_INT4, "prefill", 1024), 1.5, form=TIMES, without=NO_LITERT),
    Goal("prefill", "int4 to llama.cpp's Q4_0, 1,024 tokens", "peers",
         against("int4", LLAMA, "prefill", 1024), None, form=TIMES),
    Goal("prefill", "qat-mobile to LiteRT-LM's 2 and 4 bits, 1,024 tokens", "peers",
         against(QAT, LITERT_MIX, "prefill", 1024), 1.0, form=TIMES, needs=QAT, without=NO_LITERT),
    Goal("prefill", "int4, packed, peak memory to LiteRT-LM's int4", "peers",
         against("int4", LITERT_INT4, "peak_bytes", packed=True), None, "<=", TIMES, without=NO_LITERT),
    Goal("prefill", "qat-mobile, packed, the same prompt to LiteRT-LM's mix", "peers",
         against(QAT, LITERT_MIX, "prefill", 1024, packed=True), 1.0, form=TIMES, needs=QAT,
         without=NO_LITERT),
    Goal("prefill", "qat-mobile, packed, peak memory to LiteRT-LM's mix", "peers",
         against(QAT, LITERT_MIX, "peak_bytes", packed=True), 1.0, "<=", TIMES, needs=QAT, without=NO_LITERT),
    Goal("prefill", "qat-mobile, own weights, peak memory to LiteRT-LM's mix", "peers",
         against(QAT, LITERT_MIX, "peak_bytes"), 1.0, "<=", TIMES, needs=QAT, without=NO_LITERT),
    Goal("prefill", "int4, speed at 4,096 tokens to that at 1,024", "prefill",
         longer(4096), 1.0, form=TIMES, without=SHORT),
    Goal("prefill", "int4, speed at 16,384 tokens to that at 1,024", "prefill",
         longer(16384), 1.0, form=TIMES, without=SHORT),
]
START = [
    goal for recipe, run in (("int4", "start"), (QAT, "start-qat")) for goal in (
        Goal("start", f"{recipe}, packed, to the first token", run,
             packed("first_token_s"), limit("first_token_s"), "<=", "{:.2f} s"),
        Goal("start", f"{recipe}, packed, anonymous memory, caches in it", run,
             packed("anonymous_bytes"), limit("anonymous_bytes"), "<=", *MB),
        Goal("start", f"{recipe}, packed, peak memory, mapped pages in it", run,
             packed("peak_rss_bytes"), limit("peak_rss_bytes"), "<=", *MB),
    )
]
REST = [
    Goal("caches", "E2B's at 32,768 tokens, int8", "kv",
         lambda line: line["sizes"]["int8"], 110e6, "<=", *MB),
    Goal("caches", "int8 to float32, divergence (KL) on nano, int4", "kv",
         lambda line: (row(line["rows"], recipe="int4", kv="int8") or {}).get("kl"), None, form="{:.4f}"),
    Goal("reuse", "tokens run for a window of 150, system prompt of 1,000", "reuse",
         lambda line: line["tokens_run"]["window_with"], 150, "<=", "{:.0f}"),
    Goal("reuse", "tokens run for a second turn of 30", "reuse",  # and the answer's last one
         lambda line: line["tokens_run"]["turn_with"], 31, "<=", "{:.0f}"),
    Goal("reuse", "first token of that window, sooner by", "reuse", figure("window_ratio"), None, form=TIMES),
    Goal("reuse", "first token of that turn, sooner by", "reuse", figure("turn_ratio"), None, form=TIMES),
    Goal("guesses", "summaries, full size, nano's acceptance", "speculation-full",
         figure("ratio"), 1.5, form=TIMES),
    Goal("guesses", "the same, tokens a pass", "speculation-full", figure("tokens_per_pass"), None),
    Goal("guesses", "the same, after 100 other answers", "speculation-warm",
         figure("ratio"), 1.5, form=TIMES),
    Goal("guesses", "the same, tokens a pass, after 100 others", "speculation-warm",
         figure("tokens_per_pass"), None),
    Goal("guesses", "the same, if passes took what they do on a Xeon", "speculation-xeon",
         figure("ratio"), None, form=TIMES),
    Goal("guesses", "summaries on nano", "speculation", figure("ratio"), None, form=TIMES),
    Goal("guesses", "every guess wrong, nano", "speculation-wrong", figure("ratio"), 0.97, form=TIMES),
    Goal("tokenizer", "texts with exactly Hugging Face's ids", "tokenizer",
         figure("compared_texts"), 100_000, form="{:,.0f}"),
    Goal("tokenizer", "time to load", "tokenizer", figure("load_s"), 0.15, "<=", "{:.0f} ms", 1e3),
    Goal("tokenizer", "memory after a prompt of 1,000 tokens", "tokenizer",
         figure("rss_bytes"), 40e6, "<=", *MB),
    Goal("overhead", "of a decode step, outside ONNX Runtime", "overhead",
         figure("outside_share"), 0.02, "<=", PERCENT, needs="full"),
    Goal("overhead", "idle daemon, of one CPU", "overhead", figure("idle_cpu_share"), 0.005, "<=", PERCENT),
    Goal("overhead", "memory before the model", "overhead",
         figure("rss_before_model_bytes"), 80e6, "<=", *MB),
]
# fmt: on
GOALS = [*DECODE, *PREFILL, *START, *REST]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--peers", type=Path, metavar="DIR")
    parser.add_argument("--results", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="RUN", help=", ".join(RUNS))
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    with tempfile.TemporaryDirectory() as folder:
        words = words_of(args.bundles, args.peers)
        kept, names = kept_lines(args.results), args.only or [*RUNS]
        if "nano" not in words and any("{nano}" in RUNS[name] for name in names if name not in kept):
            words["nano"] = [str(export_nano(Path(folder)))]
        lines, reasons = run_all(names, words, kept, args.results)
    rows = [judge(goal, lines, reasons, words) for goal in GOALS]
    print()
    print("\n".join(table(rows)))
    failed = [name for name, reason in reasons.items() if reason.startswith("failed")]
    print_json({"bench": "targets", "rows": rows, "failed": failed, "machine": about})
    return 1 if failed or any(row["verdict"] == "failed" for row in rows) else 0


def words_of(bundles: list[Path], peers: Path | None) -> dict[str, list[str]]:
    """What the words in braces stand for; those that are missing have nothing to stand for."""
    full_sizes = [model_of(name).geometry for name in MODELS]
    small = model_of(str(NANO / "config.json")).geometry
    words: dict[str, list[str]] = {"any": [str(bundles[0])], "full": []}
    for path in bundles:
        try:
            manifest = open_bundle(path).manifest
        except BundleError as error:
            raise SystemExit(str(error)) from None
        if manifest.geometry in full_sizes:
            words["full"].append(str(path))
            words.setdefault(manifest.recipe, [str(path)])
        elif manifest.geometry == small:
            words.setdefault("nano", [str(path)])
    if peers is not None:
        words["peers"] = [str(peers)]
    return words


def export_nano(folder: Path) -> Path:
    print("exporting the nano model, for what is measured on it", flush=True)
    command = [sys.executable, "-m", "gemma_edge.cli", "export", "--model", str(NANO)]
    command += ["--device", "x86-64-generic", "--recipe", "int4", "--out", str(folder / "nano")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "nano"


def run_all(
    names: list[str], words: dict[str, list[str]], kept: dict[str, Line], results: Path | None
) -> tuple[dict[str, Line], dict[str, str]]:
    """By name: the scripts' last lines, or why there is none."""
    lines, reasons = {}, dict.fromkeys(RUNS, "not asked for")
    for name in names:
        missing = [word for part in RUNS[name] for word in braces(part) if not words.get(word)]
        if name in kept:
            lines[name] = kept[name]
        elif missing:
            reasons[name] = f"needs {WANTED[missing[0]]}"
            continue
        else:
            command = [word for part in RUNS[name] for word in (filled(part, words))]
            print(f"\n== {name}: bench/{' '.join(command)}", flush=True)
            try:
                lines[name] = run(command)
            except RuntimeError as error:
                reasons[name] = f"failed: {error}"
                print(f"{name} {reasons[name]}", flush=True)
                continue
            if results is not None:
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"run": name, "line": lines[name]}) + "\n")
        del reasons[name]
    return lines, reasons


def braces(part: str) -> list[str]:
    return [part[1:-1]] if part.startswith("{") else []


def filled(part: str, words: dict[str, list[str]]) -> list[str]:
    return words[part[1:-1]] if part.startswith("{") else [part]


def kept_lines(results: Path | None) -> dict[str, Line]:
    if results is None or not results.exists():
        return {}
    found = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {entry["run"]: entry["line"] for entry in found}


def run(command: list[str]) -> Line:
    """The last line of a script of this folder; what it prints before is passed on."""
    last = ""
    script = Path(__file__).with_name(command[0])
    with subprocess.Popen(
        [sys.executable, str(script), *command[1:]], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        timer = threading.Timer(LIMIT_S, child.kill)
        timer.start()
        for text in child.stdout:
            if last:
                print(last, flush=True)
            last = text.rstrip("\n")
        status = child.wait()
        timer.cancel()
    if status:
        print(last, flush=True)
        raise RuntimeError(f"{command[0]} ended with status {status}")
    try:
        line = json.loads(last)
    except ValueError:
        line = None
    if not isinstance(line, dict):
        raise RuntimeError(f"the last line of {command[0]} is not a JSON object: {last[:100]!r}")
    return line


def judge(goal: Goal, lines: dict[str, Line], reasons: dict[str, str], words: dict[str, list[str]]) -> Line:
    """One row: figures as numbers, and as a person reads them."""
    empty = {"part": goal.part, "what": goal.what, "value": None, "target": None, "measured": "-"}
    fixed = goal.target if isinstance(goal.target, int | float) else None
    wanted = "" if fixed is None else f"{goal.sense} {goal.form.format(fixed * goal.scale)}"
    empty |= {"target": fixed, "wanted": wanted}
    if goal.needs and not words.get(goal.needs):
        return empty | {"verdict": "not run", "why": f"needs {WANTED[goal.needs]}"}
    if goal.run not in lines:
        reason = reasons[goal.run]
        return empty | {"verdict": "failed" if reason.startswith("failed") else "not run", "why": reason}
    line = lines[goal.run]
    try:
        value = goal.value(line)
        target = goal.target(line) if callable(goal.target) else goal.target
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        return empty | {
            "verdict": "failed",
            "why": f"failed: the line of {goal.run} has no such figure ({error!r})",
        }
    if value is None:
        return empty | {"verdict": "not run", "why": goal.without}
    wanted = "" if target is None else f"{goal.sense} {goal.form.format(target * goal.scale)}"
    verdict = "measured"
    if target is not None:
        verdict = "met" if (value >= target if goal.sense == ">=" else value <= target) else "missed"
    measured = goal.form.format(value * goal.scale)
    return empty | {
        **{"value": value, "measured": measured, "target": target, "wanted": wanted},
        **{"verdict": verdict, "why": ""},
    }


def table(rows: list[Line]) -> list[str]:
    """Lines of Markdown, columns aligned."""
    cells = [["", "what", "measured", "target", ""], ["---"] * 5]
    part = ""
    for found in rows:
        verdict = found["verdict"] if not found["why"] else f"{found['verdict']}: {found['why']}"
        if found["verdict"] == "failed":
            verdict = found["why"]  # which begins with that word
        begins = found["part"] if found["part"] != part else ""
        part = found["part"]
        cells.append([begins, found["what"], found["measured"], found["wanted"], verdict])
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]


if __name__ == "__main__":
    raise SystemExit(main())
