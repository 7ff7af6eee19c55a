"""The genai engine: the built-in engine's tokens, from the same bundle, and clear words where it cannot."""

from __future__ import annotations

import importlib.util
import json
import random
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import pytest

from gemma_edge.cli import main
from gemma_edge.examples.nano_model.windows import random_window
from gemma_edge.examples.sensor_summary.prompt import summary_messages
from gemma_edge.runtime import genai_engine
from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.chat import load_template
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.errors import BundleError, ConfigError, RequestError
from gemma_edge.runtime.genai_engine import GenaiEngine, search_options
from gemma_edge.runtime.genai_files import AUDIO_OVERLAY
from gemma_edge.runtime.prompt import NOW, Part, Soft
from gemma_edge.runtime.sampler import SamplingParams, candidates
from gemma_edge.runtime.tokenizer import load_tokenizer

from .support.cancelling import SetAfter
from .support.daemon_process import SERVE, chat, daemon_process, request, stream, user
from .support.graph_runner import GraphRunner
from .support.hearing import hearing_bundle, input_audio, wav
from .support.tiny_audio import random_frames
from .support.tiny_bundles import TinyBundle

CHUNK, CONTEXT, HIDDEN = 32, 512, 64


@pytest.fixture(scope="module")
def tiny(tiny_bundle) -> TinyBundle:
    return hearing_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def ours(tiny: TinyBundle) -> Engine:
    return Engine(tiny.bundle, threads=1)


@pytest.fixture(scope="module")
def text(tiny: TinyBundle) -> GenaiEngine:
    return GenaiEngine(tiny.bundle, threads=1)


@pytest.fixture(scope="module")
def hearing(tiny: TinyBundle) -> GenaiEngine:
    return GenaiEngine(tiny.bundle, threads=1, hears=True)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(23, 512, length).tolist()


def soft_tokens(count: int, seed: int = 0) -> Soft:
    rows = np.random.default_rng(seed).normal(size=(count, HIDDEN)) * 3
    return Soft(rows.astype(np.float32))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 201])
def test_greedy_tokens_are_the_built_in_engines(
    ours: Engine, text: GenaiEngine, hearing: GenaiEngine, length: int
):
    prompt = prompt_of(length, seed=length)
    expected = list(ours.generate(prompt, max_new_tokens=40))
    for engine in (text, hearing):
        assert list(engine.generate(prompt, max_new_tokens=40)) == expected
        stats, theirs = engine.last_stats, ours.last_stats
        assert (stats.finish, stats.prompt_tokens, stats.new_tokens, stats.decode_steps) == (
            theirs.finish,
            theirs.prompt_tokens,
            theirs.new_tokens,
            theirs.decode_steps,
        )
        assert 0 < stats.prefill_s <= stats.ttft_s


@pytest.mark.parametrize("options", [{"kv": "float16"}, {"kv": "int8"}, {"recipe": "int4"}], ids=str)
def test_other_caches_and_quantized_weights(tiny_bundle, options: dict):
    bundle = tiny_bundle(context=192, chunk=16, **options).bundle
    prompt = prompt_of(16, seed=3)  # one chunk: a tiny random model makes much of rounding between chunks
    expected = list(Engine(bundle, threads=1).generate(prompt, max_new_tokens=12))
    assert list(GenaiEngine(bundle, threads=1).generate(prompt, max_new_tokens=12)) == expected


def test_nano_summarizes_alike(nano_bundle: Path):
    """The bundled model, int4: prompts of more than one chunk, answers that end by themselves."""
    bundle = open_bundle(nano_bundle)
    tokenizer, template = load_tokenizer(bundle), load_template(bundle)
    ours, theirs = Engine(bundle, threads=1), GenaiEngine(bundle, threads=1)
    for seed in range(4):
        window = random_window(random.Random(seed), held_out=True)
        prompt = template.encode(tokenizer, summary_messages(window))
        expected = list(ours.generate(prompt, max_new_tokens=200))
        assert list(theirs.generate(prompt, max_new_tokens=200)) == expected
        assert theirs.last_stats.finish == ours.last_stats.finish == "stop"


def test_less_than_the_window(nano_bundle: Path):
    """genai would make caches too short for the operator."""
    bundle = open_bundle(nano_bundle)
    prompt = np.random.default_rng(0).integers(100, 4000, 20).tolist()
    expected = list(Engine(bundle, threads=1).generate(prompt, max_new_tokens=10))
    assert bundle.manifest.geometry.sliding_window > 30
    assert list(GenaiEngine(bundle, threads=1).generate(prompt, max_new_tokens=10)) == expected


PARTS: list[list[Part]] = [
    [[2, 40, 41], soft_tokens(7), [50, 51]],
    [soft_tokens(1), [50]],
    [
        prompt_of(60),
        soft_tokens(45, seed=1),
        [50, 51, 52],
        NOW,
        soft_tokens(20, seed=2),
        prompt_of(70, seed=5),
    ],
    [[2], soft_tokens(40, seed=3)],
]


@pytest.mark.parametrize("parts", PARTS, ids=["one sound", "at the start", "two, long", "at the end"])
def test_prompts_with_sounds(ours: Engine, hearing: GenaiEngine, parts: list[Part]):
    expected = list(ours.generate_from(parts, max_new_tokens=30))
    assert list(hearing.generate_from(parts, max_new_tokens=30)) == expected
    assert hearing.last_stats.prompt_tokens == ours.last_stats.prompt_tokens


def test_genai_runs_the_audio_encoder_itself(tiny: TinyBundle, ours: Engine):
    """Without this project's runtime: log-mel frames and ids in, one clip in the first turn."""
    frames, before, after = random_frames(26, 128), [2, 40, 41, 42], [50, 51, 52]
    tokens = -(-len(frames) // 4)
    placeholder = tiny.bundle.manifest.audio.tokens.placeholder
    config = genai.Config(str(tiny.path))
    config.overlay((tiny.path / AUDIO_OVERLAY).read_text())
    model = genai.Model(config)
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(before) + tokens + len(after) + 20)
    generator = genai.Generator(model, params)
    inputs = genai.NamedTensors()
    inputs["input_ids"] = np.array([before + [placeholder] * tokens + after], np.int32)
    inputs["input_features"] = frames[None]
    inputs["audio_sizes"] = np.array([tokens], np.int64)
    generator.set_inputs(inputs)
    answer = []
    while not generator.is_done():
        generator.generate_next_token()
        answer.append(int(generator.get_next_tokens()[0]))
    encoder = GraphRunner(tiny.path).open("audio_encoder.onnx")
    rows = encoder.run(None, {"input_features": frames[None]})[0][0]
    assert answer == list(ours.generate_from([before, Soft(rows), after], max_new_tokens=20))


def test_stop_tokens_end_an_answer(ours: Engine, text: GenaiEngine):
    for seed in range(200):
        prompt = prompt_of(12, seed=seed)
        expected = list(ours.generate(prompt, max_new_tokens=100))
        if ours.last_stats.finish == "stop":
            break
    assert list(text.generate(prompt, max_new_tokens=100)) == expected
    assert (text.last_stats.finish, text.last_stats.new_tokens) == ("stop", len(expected))
    assert text.eos == ours.eos


def test_repetition_penalty(ours: Engine, text: GenaiEngine):
    params, prompt = SamplingParams(repetition_penalty=1.4), prompt_of(30, seed=4)
    expected = list(ours.generate(prompt, params, max_new_tokens=30))
    assert list(text.generate(prompt, params, max_new_tokens=30)) == expected
    assert expected != list(ours.generate(prompt, max_new_tokens=30))


def test_a_seed_repeats(text: GenaiEngine):
    def answer(seed: int) -> list[int]:
        params = SamplingParams(temperature=1.2, top_k=50, top_p=0.95, seed=seed)
        return list(text.generate(prompt_of(9), params, max_new_tokens=20))

    assert answer(2**40 + 4) == answer(2**40 + 4) != answer(5)


@pytest.mark.parametrize(
    "params",
    [
        dict(temperature=1.0, top_k=4),
        dict(temperature=0.6, top_k=6),
        dict(temperature=1.0, top_p=0.2),
        dict(temperature=1.3, top_k=12, top_p=0.6),
        dict(temperature=0.4),
    ],
    ids=str,
)
def test_what_is_drawn_is_what_was_asked_for(text: GenaiEngine, tiny: TinyBundle, params: dict):
    """Frequencies of 400 draws against the probabilities that the built-in sampler draws from."""
    prompt, draws = prompt_of(9), 400
    logits = GraphRunner(tiny.path).run(prompt)[-1]
    ids, weights = candidates(logits.astype(np.float64), SamplingParams(**params))
    expected = dict(zip(ids.tolist(), weights / weights.sum(), strict=True))
    drawn = Counter(
        next(text.generate(prompt, SamplingParams(**params, seed=seed), max_new_tokens=1))
        for seed in range(draws)
    )
    assert set(drawn) <= set(expected)
    for token, probability in expected.items():
        deviation = (probability * (1 - probability) / draws) ** 0.5
        assert abs(drawn[token] / draws - probability) < 4.5 * deviation + 1 / draws, token


def test_greedy_whatever_else_is_asked(text: GenaiEngine):
    prompt = prompt_of(20)
    expected = list(text.generate(prompt, max_new_tokens=15))
    greedy = SamplingParams(temperature=0.0, top_k=5, top_p=0.3, min_p=0.2, seed=3)
    assert list(text.generate(prompt, greedy, max_new_tokens=15)) == expected
    one = SamplingParams(temperature=1.0, top_k=1)
    assert list(text.generate(prompt, one, max_new_tokens=15)) == expected


def test_min_p_is_refused():
    with pytest.raises(RequestError, match="min_p") as error:
        search_options(SamplingParams(temperature=1.0, min_p=0.1), 512)
    assert error.value.code == "invalid_request"


def test_cancelling(text: GenaiEngine, hearing: GenaiEngine):
    for engine in (text, hearing):
        assert list(engine.generate(prompt_of(200), max_new_tokens=5, cancel=SetAfter(3))) == []
        assert (engine.last_stats.finish, engine.last_stats.ttft_s) == ("cancelled", 0.0)
        cancel = threading.Event()
        tokens = engine.generate(prompt_of(10), max_new_tokens=50, cancel=cancel)
        got = [next(tokens) for _ in range(3)]
        cancel.set()
        assert list(tokens) == []
        assert (engine.last_stats.finish, engine.last_stats.new_tokens) == ("cancelled", len(got))


def test_an_overtaken_generation_cannot_go_on(text: GenaiEngine):
    old = text.generate(prompt_of(10), max_new_tokens=50)
    next(old)
    list(text.generate(prompt_of(12), max_new_tokens=5))
    stats = text.last_stats
    with pytest.raises(RuntimeError, match="another generation"):
        next(old)
    assert text.last_stats is stats


@pytest.mark.parametrize(
    ("length", "new_tokens"), [(CONTEXT, None), (CONTEXT - 10, 11), (CONTEXT + 100, 1), (1, CONTEXT)]
)
def test_too_much_for_the_context_is_refused_at_once(text: GenaiEngine, length: int, new_tokens: int | None):
    with pytest.raises(RequestError) as error:
        text.generate(prompt_of(length), max_new_tokens=new_tokens)
    assert error.value.code == "context_length_exceeded"


def test_the_context_can_be_filled(ours: Engine, text: GenaiEngine):
    prompt = prompt_of(CONTEXT - 6)
    assert list(text.generate(prompt)) == list(ours.generate(prompt))


@pytest.mark.parametrize("prompt", [[], [-1], [512]])
def test_impossible_prompts_are_refused_at_once(text: GenaiEngine, prompt: Sequence[int]):
    with pytest.raises(RequestError) as error:
        text.generate(prompt, max_new_tokens=5)
    assert error.value.code == "invalid_request"


def test_placeholders_and_soft_tokens_where_none_can_be(
    tiny: TinyBundle, text: GenaiEngine, hearing: GenaiEngine, tiny_bundle
):
    placeholder = tiny.bundle.manifest.audio.tokens.placeholder
    with pytest.raises(RequestError, match="stands for a sound"):
        hearing.generate([2, placeholder, 3])
    with pytest.raises(ValueError, match="without `hears`"):
        list(text.generate_from([soft_tokens(2)]))
    with pytest.raises(RequestError, match="no prefix cache"):
        text.remember([2, 3], "system")
    deaf = tiny_bundle(context=192, chunk=16, kv="int8").bundle
    with pytest.raises(BundleError, match="does not hear"):
        GenaiEngine(deaf, hears=True)


def test_genai_that_is_not_there_or_another_version(tiny: TinyBundle, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(genai, "__version__", "0.9.0")
        with pytest.raises(ConfigError, match=r"0\.9\.0, expected 0\.18"):
            GenaiEngine(tiny.bundle)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        genai_engine.importlib.util,
        "find_spec",
        lambda name: None if name == "onnxruntime_genai" else find(name),
    )
    with pytest.raises(ConfigError, match=r"not installed; pip install 'gemma-edge\[genai\]'"):
        GenaiEngine(tiny.bundle)


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["ask", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_ask_says_the_same(tiny: TinyBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sound = tmp_path / "sound.wav"
    sound.write_bytes(wav())
    for arguments in (["Is the window open?"], ["What was said?", "--audio", sound]):
        said = ask(capsys, tiny.path, *arguments, "--max-tokens", 20)
        assert said[0] == 0 and said[1].strip()
        assert ask(capsys, tiny.path, *arguments, "--max-tokens", 20, "--engine", "genai") == said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--speculate 4", "--speculate"),
        ("--speculate auto --prefix-cache 8", "--speculate, --prefix-cache"),
        ("--prefix-dir /tmp/x", "--prefix-dir"),
        ("--prepare first-start --residency lock", "--prepare, --residency"),
    ],
)
def test_what_it_cannot_do_is_refused(
    tiny: TinyBundle, arguments: str, named: str, capsys: pytest.CaptureFixture[str]
):
    status, out, err = ask(capsys, tiny.path, "Hello", "--engine", "genai", *arguments.split())
    assert status != 0 and out == ""
    assert f"leave out {named}, or take --engine builtin" in err


def test_off_is_no_wish(tiny: TinyBundle, capsys: pytest.CaptureFixture[str]):
    off = ["--speculate", "off", "--prefix-cache", 0]
    assert ask(capsys, tiny.path, "Hi", "--max-tokens", 3, "--engine", "genai", *off)[0] == 0


def test_serve_answers_texts_and_sounds(tiny: TinyBundle, tmp_path: Path):
    """A daemon with the genai engine: streamed text, a sound, cancelling, and what --pin says."""
    path = tmp_path / "x.sock"
    command = [*SERVE, str(tiny.path), "--socket", str(path), "--threads", "1"]
    answers = []
    for options in (["--engine", "genai"], []):
        with daemon_process([*command, *options], tmp_path / "log") as daemon:
            text = chat(path, "Is the window open?", max_tokens=20)[2]["choices"][0]
            messages = [{"role": "user", "content": [input_audio(wav())]}]
            sound = request(path, "POST", "/v1/chat/completions", dict(messages=messages, max_tokens=12))[2]
            streamed = [
                json.loads(data) for data in stream(path, dict(messages=user("Hi"), max_tokens=9))[:-1]
            ]
            words = "".join(part["choices"][0]["delta"].get("content") or "" for part in streamed)
            answers.append((text, sound["choices"], words))
            assert ("no prefix cache, no guesses" in daemon.log()) == bool(options)
    assert answers[0] == answers[1] and answers[0][2]
    prompt = tmp_path / "system.txt"
    prompt.write_text("Be short.")
    pinned = [*command, "--engine", "genai", "--pin", str(prompt)]
    with daemon_process(pinned, tmp_path / "log", ready=False) as daemon:
        assert daemon.wait_exit() == 1 and "leave out --pin" in daemon.log()
