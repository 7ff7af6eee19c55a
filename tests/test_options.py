"""The engine's options: parsed, refused, and what they do to a nano bundle from the command line."""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma_edge.cli import main
from gemma_edge.examples.nano_model.windows import random_window
from gemma_edge.examples.sensor_summary.prompt import SUMMARY_SYSTEM, summary_messages
from gemma_edge.runtime import engine, options
from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.chat import ChatTemplate, load_template
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.tokenizer import Tokenizer, load_tokenizer

WINDOWS = [
    "Site 'Rumcrond', 14:00 to 20:00, 1 sensors:\n- 'kloot/press' (line pressure, kPa): 24 readings, "
    "min 352, max 491, mean 386, last 445, rising 4/h, limit at least 99",
    "Site 'Barn 2', 06:00 to 12:00, 1 sensors:\n- 'attic/temp' (temperature, °C): 31 readings, min 18.2, "
    "max 21.4, mean 19.9, last 20.1, steady",
]
LIGHT = {"name": "light", "description": "Turn a light on", "parameters": {}}


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    options.add_engine_arguments(parser)
    return parser.parse_args(arguments)


def test_defaults():
    args = parsed()
    assert (args.engine, args.speculate, args.prefix_cache, args.prefix_dir) == ("builtin", None, None, None)


@pytest.mark.parametrize(
    ("given", "draft"), [("off", 0), ("auto", 8), ("0", 0), ("1", 1), ("15", 15), ("007", 7)]
)
def test_how_much_is_guessed(given: str, draft: int):
    assert parsed("--speculate", given).speculate == draft


@pytest.mark.parametrize(("given", "budget"), [("0", 0), ("1", 1 << 20), ("0.5", 1 << 19), ("64", 64 << 20)])
def test_the_memory_of_the_prefix_cache(given: str, budget: int):
    assert parsed("--prefix-cache", given).prefix_cache == budget


@pytest.mark.parametrize(
    "arguments",
    ["--speculate 16", "--speculate -1", "--speculate on", "--prefix-cache -1", "--prefix-cache nan",
     "--prefix-cache many", "--prefix-cache 1e9"],
)  # fmt: skip
def test_nonsense_is_refused(arguments: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parsed(*arguments.split())
    assert "expected" in capsys.readouterr().err


@pytest.fixture(scope="module")
def words(nano_bundle: Path) -> tuple[Tokenizer, ChatTemplate]:
    bundle = open_bundle(nano_bundle)
    return load_tokenizer(bundle), load_template(bundle)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_where_a_system_turn_ends(words):
    tokenizer, template = words
    end = options.system_end(tokenizer)
    system = template.encode(tokenizer, [said("system", "Be brief.")], add_generation_prompt=False)
    prompt = template.encode(tokenizer, [said("system", "Be brief."), said("user", "system: hello")])
    assert prompt[: len(system)] == system
    assert end(prompt) == len(system)
    assert end(system) is None  # no turn follows
    assert end(template.encode(tokenizer, [said("user", "system: hello")])) is None
    assert end([]) is None
    assert end([key if key < len(system) else -key for key in prompt[: len(system)]]) is None
    assert end([*prompt[: len(system)], *(-5 for _ in range(9)), *prompt[len(system) :]]) == len(system) + 9


def ask(bundle: Path, capsys: pytest.CaptureFixture[str], window: str, *arguments: str) -> tuple[str, str]:
    assert main(["ask", str(bundle), window, "--system", SUMMARY_SYSTEM, "--threads", "1", *arguments]) == 0
    return capsys.readouterr()


def test_the_next_start_reuses_what_is_on_disk(nano_bundle: Path, tmp_path: Path, capsys):
    plain = [ask(nano_bundle, capsys, window, "--speculate", "off")[0] for window in WINDOWS]
    assert json.loads(plain[0])["severity"] == 0
    kept = ("--prefix-dir", str(tmp_path), "--stats")
    first, second = (ask(nano_bundle, capsys, window, *kept) for window in WINDOWS)
    assert [first[0], second[0]] == plain
    assert "reused" not in first[1] and "reused)" in second[1]
    assert "guesses right" in first[1]
    assert len(list(tmp_path.glob("*/*.kv"))) == 1


def test_pinned_prompts_come_from_texts_and_messages(nano_bundle: Path, words, tmp_path: Path):
    tokenizer, template = words
    engine = options.open_engine(open_bundle(nano_bundle), parsed(), tokenizer)
    text, talk = tmp_path / "greenhouse.txt", tmp_path / "house.json"
    text.write_text(SUMMARY_SYSTEM)
    tool = {
        "type": "function",
        "function": {"name": "light", "description": "Turn a light on", "parameters": {}},
    }
    talk.write_text(json.dumps({"messages": [said("system", "Be brief.")], "tools": [tool]}))
    for file in (text, talk):
        options.pin(engine, tokenizer, template, file)
    assert {one.name for one in engine._reuse.snapshots} == {"greenhouse", "house"}
    messages = [said("system", SUMMARY_SYSTEM), said("user", WINDOWS[0])]
    list(engine.generate(template.encode(tokenizer, messages), max_new_tokens=3))
    assert engine.last_stats.reused_tokens > 100
    messages = [said("system", "Be brief."), said("user", "hello")]
    list(engine.generate(template.encode(tokenizer, messages, [tool]), max_new_tokens=3))
    assert engine.last_stats.reused_tokens > 20
    for name, content in (("a.txt", None), ("a.json", "{"), ("b.json", '{"messages": 3}')):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match="expected"):
            options.pin(engine, tokenizer, template, tmp_path / name)


def test_nano_says_the_same_with_and_without_all_of_it(
    nano_bundle: Path, words, monkeypatch: pytest.MonkeyPatch
):
    """Summaries under one system prompt, each followed by a question about it in a second turn.

    All passes take equally long: whether guesses pay must not depend on what else the machine does.
    """
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    tokenizer, template = words
    bundle = open_bundle(nano_bundle)
    plain = Engine(bundle, threads=1)
    fast = options.open_engine(bundle, parsed(), tokenizer)
    reused, accepted = [], 0
    for seed in range(5):
        messages = list(summary_messages(random_window(random.Random(seed), held_out=True)))
        for turn in range(2):
            prompt = template.encode(tokenizer, messages)
            tokens = list(fast.generate(prompt, max_new_tokens=250))
            assert tokens == list(plain.generate(prompt, max_new_tokens=250)), f"window {seed}, turn {turn}"
            assert fast.last_stats.finish == "stop"
            reused.append(fast.last_stats.reused_tokens)
            accepted += fast.last_stats.accepted
            answer = said("assistant", tokenizer.decode(tokens))
            messages += [answer, said("user", "Which sensors are outside their limits?")]
    system = len(template.encode(tokenizer, messages[:1], add_generation_prompt=False))
    assert reused[::2] == [0, system, system, system, system]
    assert all(count > system + 100 for count in reused[1::2])
    assert accepted > 100
