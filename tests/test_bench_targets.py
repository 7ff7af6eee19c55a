"""bench/targets.py: scripted last lines of the benchmarks become one table, with verdicts and a status."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RATIOS = {"decode": {"0": 1.6, "1024": 1.4}, "prefill": {"128": 2.0, "1024": 1.2}, "peak_bytes": 0.9}
START = {
    "rows": [
        {"start": "plain", "first_token_s": 9.0},
        {"start": "packed, map", "first_token_s": 1.9, "anonymous_bytes": 5e8, "peak_rss_bytes": 2e9},
    ],
    "targets": {"first_token_s": 2.0, "anonymous_bytes": 4e8, "peak_rss_bytes": None},
}
SPEEDS = {1024: 700.0, 4096: 630.0}
# By script: the last line, as it comes from a real run, reduced to what the table reads.
LINES: dict[str, dict[str, Any]] = {
    "decode.py": {
        "depths": [{"depth": 0, "share_of_bandwidth": 0.8}, {"depth": 1024, "share_of_bandwidth": 0.7}]
    },
    "peers.py": {
        "recipes": {"a": "int4", "a, packed": "int4", "b": "qat-mobile", "b, packed": "qat-mobile"},
        "share_of_bandwidth": {"b": {"0": 0.6, "1024": 0.5}},
        "against": {
            "a": {"llama.cpp": RATIOS, "LiteRT-LM int4": RATIOS},
            "b": {"llama.cpp": RATIOS, "LiteRT-LM 2/4-bit": RATIOS | {"peak_bytes": 1.1}},
            "a, packed": {"llama.cpp": RATIOS, "LiteRT-LM int4": RATIOS},
            "b, packed": {"llama.cpp": RATIOS, "LiteRT-LM 2/4-bit": RATIOS},
        },
    },
    "prefill.py": {
        "rows": [{"path": "decoder", "tokens": 1024, "tok_s": 1.0}]
        + [{"path": "graph", "tokens": tokens, "tok_s": speed} for tokens, speed in SPEEDS.items()]
    },
    "start.py": START,
    "kv.py": {"rows": [{"recipe": "int4", "kv": "int8", "kl": 0.0015}], "sizes": {"int8": 104e6}},
    "reuse.py": {
        "tokens_run": {"window_with": 150, "turn_with": 31},
        "window_ratio": 5.0,
        "turn_ratio": 20.0,
    },
    "speculation.py": {"ratio": 1.55, "tokens_per_pass": 1.8},
    "tokenizer.py": {"compared_texts": 100_000, "load_s": 0.004, "rss_bytes": 14e6},
    "overhead.py": {"outside_share": 0.006, "idle_cpu_share": 0.002, "rss_before_model_bytes": 81e6},
}
FULL = {
    "int4": ["bundles/a"], "qat-mobile": ["bundles/b"], "full": ["bundles/a", "bundles/b"],
    "nano": ["bundles/n"], "any": ["bundles/a"], "peers": ["peers"],
}  # fmt: skip


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch):
    """The module; whatever bundles are named, they are FULL's."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module = importlib.import_module("targets")
    monkeypatch.setattr(module, "words_of", lambda bundles, peers: FULL)
    yield module
    for name in ("targets", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def scripts(targets: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Programs in place of the scripts: each prints a line of text, then its line of LINES."""
    for name, line in LINES.items():
        text = f"import sys\nprint('running', *sys.argv[1:])\nprint({json.dumps(line)!r})\n"
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(targets, "__file__", str(tmp_path / "targets.py"))
    return tmp_path


def run(
    targets: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, dict[str, Any]]:
    """(status, all that was printed, rows by what they are of)."""
    monkeypatch.setattr(sys, "argv", ["targets.py", *arguments])
    status = targets.main()
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["bench"] == "targets"
    return status, out, {row["what"]: row for row in result["rows"]}


def test_all_figures_stand_beside_their_targets(targets, scripts, capsys, monkeypatch) -> None:
    status, out, rows = run(targets, capsys, monkeypatch, "a", "b", "--peers", "peers")
    assert status == 0 and len(rows) == len(targets.GOALS)
    verdicts = {what: row["verdict"] for what, row in rows.items()}
    assert verdicts["qat-mobile to LiteRT-LM's 2 and 4 bits, depth 0"] == "met"
    assert verdicts["qat-mobile to LiteRT-LM's 2 and 4 bits, depth 1024"] == "missed"
    assert verdicts["int4, of the memory's bandwidth, depth 1024"] == "missed"
    assert verdicts["int4, packed, anonymous memory, caches in it"] == "missed"
    assert verdicts["qat-mobile, packed, peak memory to LiteRT-LM's mix"] == "met"
    assert verdicts["qat-mobile, own weights, peak memory to LiteRT-LM's mix"] == "missed"
    assert (
        verdicts["int4, packed, peak memory, mapped pages in it"] == "measured"
    )  # the script names no target
    assert verdicts["memory before the model"] == "missed" and verdicts["idle daemon, of one CPU"] == "met"
    assert rows["int4, speed at 4,096 tokens to that at 1,024"]["value"] == pytest.approx(0.9)
    assert rows["int4, speed at 16,384 tokens to that at 1,024"]["why"] == targets.SHORT
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(lines) == len(targets.GOALS) + 2 and len({len(line) for line in lines}) == 1
    row = next(line for line in lines if "E2B's at 32,768" in line)
    assert [cell.strip() for cell in row.split("|")[3:6]] == ["104 MB", "<= 110 MB", "met"]
    assert "running bundles/a bundles/b --work peers" in out


def test_what_cannot_run_is_said_and_is_no_failure(targets, scripts, capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        targets, "words_of", lambda *_: {"any": ["bundles/n"], "nano": ["bundles/n"], "full": []}
    )
    status, _, rows = run(targets, capsys, monkeypatch, "n")
    assert status == 0
    assert rows["int4 to llama.cpp's Q4_0, depth 0"]["why"] == "needs a full-size bundle"
    assert rows["of a decode step, outside ONNX Runtime"]["why"] == "needs a full-size bundle"
    assert rows["int4, of the memory's bandwidth, depth 0"]["wanted"] == ">= 75.0%"
    assert rows["summaries on nano"]["verdict"] == "measured"
    assert rows["idle daemon, of one CPU"]["verdict"] == "met"


def test_peers_that_are_not_there_are_said(targets, scripts, capsys, monkeypatch) -> None:
    ours = LINES["peers.py"]["recipes"]
    line = LINES["peers.py"] | {"against": {name: {"llama.cpp": RATIOS} for name in ours}}
    (scripts / "peers.py").write_text(f"print({json.dumps(line)!r})")
    status, _, rows = run(targets, capsys, monkeypatch, "a", "b", "--peers", "peers")
    row = rows["int4 to LiteRT-LM's int4, 1,024 tokens"]
    assert (status, row["verdict"], row["why"]) == (0, "not run", targets.NO_LITERT)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("import sys; sys.exit(3)", "failed: kv.py ended with status 3"),
        ("print('no JSON')", "failed: the last line of kv.py is not a JSON object: 'no JSON'"),
        ("print('{}')", "failed: the line of kv has no such figure (KeyError('sizes'))"),
    ],
)
def test_a_script_that_fails_is_a_row_and_the_status(
    targets, scripts, capsys, monkeypatch, script: str, why: str
) -> None:
    (scripts / "kv.py").write_text(script)
    status, out, rows = run(targets, capsys, monkeypatch, "a")
    row = rows["E2B's at 32,768 tokens, int8"]
    assert (status, row["verdict"], row["why"]) == (1, "failed", why)
    assert any(line.startswith("| caches") and why in line for line in out.splitlines())
    assert rows["time to load"]["verdict"] == "met"  # the others go on


def test_kept_lines_are_not_run_again(targets, scripts, capsys, monkeypatch) -> None:
    kept = scripts / "kept.jsonl"
    run(targets, capsys, monkeypatch, "a", "--results", str(kept), "--only", "kv", "reuse")
    assert [json.loads(line)["run"] for line in kept.read_text().splitlines()] == ["kv", "reuse"]
    for name in ("kv.py", "reuse.py"):
        (scripts / name).write_text("raise SystemExit('run again')")
    status, _, rows = run(targets, capsys, monkeypatch, "a", "--results", str(kept))
    assert status == 0 and rows["E2B's at 32,768 tokens, int8"]["verdict"] == "met"
    assert len(kept.read_text().splitlines()) == len(targets.RUNS)


def test_every_run_is_of_a_script_that_takes_its_options(targets) -> None:
    for name, (script, *words) in targets.RUNS.items():
        text = (ROOT / "bench" / script).read_text()
        assert all(f'"{word}"' in text for word in words if word.startswith("--")), name
    assert {goal.run for goal in targets.GOALS} == {*targets.RUNS}
