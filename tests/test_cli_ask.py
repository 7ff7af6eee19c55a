"""`gemma-edge ask` as a user runs it: real process, real bundle, answer on stdout, all else on stderr."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_edge.runtime.chat import load_template
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.tokenizer import load_tokenizer

from .support.tiny_bundles import TinyBundle

CONTEXT = 192


@pytest.fixture(scope="module")
def tiny(tiny_bundle) -> TinyBundle:
    return tiny_bundle(context=CONTEXT, chunk=16)


def ask(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemma_edge.cli", "ask", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def answer_to(tiny: TinyBundle, messages: list[dict], new_tokens: int) -> str:
    """What the engine says to these messages, without service and command line."""
    tokenizer, template = load_tokenizer(tiny.bundle), load_template(tiny.bundle)
    ids = Engine(tiny.bundle).generate(template.encode(tokenizer, messages), max_new_tokens=new_tokens)
    return tokenizer.decode(ids)


def test_the_answer_is_the_engines(tiny: TinyBundle):
    done = ask(tiny.path, "Is the window open?", "--max-tokens", 20)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer_to(tiny, [{"role": "user", "content": "Is the window open?"}], 20) + "\n"
    assert done.stderr == ""


def test_system_prompt_and_stdin(tiny: TinyBundle):
    done = ask(tiny.path, "-", "--system", "Be short.", "--max-tokens", 12, stdin="Hello\n")
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello\n"}]
    assert done.stdout == answer_to(tiny, messages, 12) + "\n"


def test_a_conversation_from_json(tiny: TinyBundle, tmp_path: Path):
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
    ]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"messages": messages, "tools": []}))
    expected = answer_to(tiny, messages, 12) + "\n"
    assert ask(tiny.path, "--json", file, "--max-tokens", 12).stdout == expected
    assert ask(tiny.path, "--json", "-", "--max-tokens", 12, stdin=json.dumps(messages)).stdout == expected


def test_a_seed_repeats_a_drawn_answer(tiny: TinyBundle):
    drawn = ("--temperature", 1.5, "--top-k", 60, "--top-p", 0.95, "--min-p", 0.01, "--max-tokens", 15)
    first = ask(tiny.path, "Hello", *drawn, "--repetition-penalty", 1.1, "--seed", 1)
    assert first.returncode == 0, first.stderr
    assert first.stdout == ask(tiny.path, "Hello", *drawn, "--repetition-penalty", 1.1, "--seed", 1).stdout
    assert first.stdout != ask(tiny.path, "Hello", *drawn, "--repetition-penalty", 1.1, "--seed", 2).stdout


def test_a_stop_string_cuts(tiny: TinyBundle):
    whole = answer_to(tiny, [{"role": "user", "content": "Hello"}], 20)
    stop = next(character for character in whole[3:] if character.isascii() and character.isprintable())
    assert (
        ask(tiny.path, "Hello", "--max-tokens", 20, "--stop", stop).stdout.rstrip("\n")
        == whole.partition(stop)[0]
    )


def test_stats_go_to_stderr(tiny: TinyBundle):
    done = ask(tiny.path, "Hello", "--max-tokens", 8, "--stats")
    assert re.search(
        r"prefill \d+ tokens, [\d.]+ tok/s; decode 7 steps, [\d.]+ tok/s; time to first", done.stderr
    )
    assert re.search(
        r"loaded in [\d.]+ s; memory \d+ MiB resident, \d+ anonymous, \d+ file-backed", done.stderr
    )
    assert "tok/s" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Hello", "--max-tokens", 500], "the context holds 192"),
        (["Hello", "--max-tokens", 0], "at least 1"),
        (["Hello", "--temperature", -1], "temperature"),
        (["Hello", "--timeout", 0], "timeout_s"),
        ([], "either a prompt or --json"),
        (["Hello", "--json", "x.json"], "either a prompt or --json"),
        (["--json", "/nonexistent.json"], "not readable as JSON"),
        (["word " * 500], "the context holds 192"),
    ],
)
def test_mistakes_are_one_line_on_stderr(tiny: TinyBundle, arguments: list, message: str):
    done = ask(tiny.path, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path):
    done = ask(tmp_path, "Hello")
    assert done.returncode == 1
    assert "not a bundle" in done.stderr


@pytest.mark.parametrize(
    "options", [{"kv": "float16"}, {"kv": "int8"}, {"recipe": "int4"}, {"recipe": "int8"}]
)
def test_every_kind_of_bundle_answers(tiny_bundle, options: dict):
    done = ask(tiny_bundle(context=CONTEXT, chunk=16, **options).path, "word " * 30, "--max-tokens", 30)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 5


def test_a_short_question_opens_no_prefill_graph(tiny_bundle, tmp_path: Path):
    """It would be open after the answer; so one that cannot be opened is found by a longer question alone."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle(context=CONTEXT, chunk=16, recipe="int4", prefill="int8").path, folder)
    graph = folder / "prefill.onnx"
    graph.write_bytes(b"\0" * graph.stat().st_size)
    short, long = (ask(folder, "word " * words, "--max-tokens", 3) for words in (3, 70))
    assert short.returncode == 0 and short.stdout, short.stderr
    assert long.returncode == 1 and "prefill.onnx" in long.stderr, long.stderr
