"""Drafters: transformers' scores and guesses, answers that stay the same, bounded cost, refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from gemma_edge.cli import main
from gemma_edge.export.checkpoint import CheckpointError
from gemma_edge.export.drafter import prepare_drafter
from gemma_edge.export.drafter_geometry import parse_drafter
from gemma_edge.export.geometry import parse_text_model
from gemma_edge.export.recipes import load_recipe
from gemma_edge.export.source import find_checkpoint
from gemma_edge.runtime.drafter import Drafter, Guess
from gemma_edge.runtime.drafts import Pace
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.genai_engine import GenaiEngine
from gemma_edge.runtime.profile import load_profile
from gemma_edge.runtime.sampler import SamplingParams
from gemma_edge.runtime.session import Session

from .support.tiny_bundles import TinyBundle, export_tiny, prepare_tiny, tiny_profile
from .support.tiny_checkpoint import tiny_config
from .support.tiny_drafter import CENTROIDS, drafter_config, random_drafter, write_tiny_drafter

WINDOW, CONTEXT = 8, 128
S, F = "sliding_attention", "full_attention"
MODEL: dict[str, Any] = dict(seed=7, num_hidden_layers=6, layer_types=[S, S, F] * 2, num_kv_shared_layers=3)
KINDS: dict[str, dict[str, Any]] = {
    "centroids": dict(drafter=CENTROIDS, slack=4),
    "every token, untied": dict(drafter=dict(tie_word_embeddings=False), slack=1),
    "quantized": dict(drafter=CENTROIDS, slack=4, recipe="int4", kv="int8"),
}
EXACT = ["centroids", "every token, untied"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyBundle]:
    bundles: dict[str, TinyBundle] = {}

    def get(kind: str) -> TinyBundle:
        if kind not in bundles:
            options = dict(KINDS[kind])
            folder = tmp_path_factory.mktemp("drafter")
            drafter = write_tiny_drafter(folder / "drafter", **options.pop("drafter"))
            bundles[kind] = export_tiny(
                folder, model=MODEL, drafter=drafter, context=CONTEXT, chunk=16, **options
            )
        return bundles[kind]

    return get


def ids_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(23, 500, length).tolist()


def resident(length: int, capacity: int) -> int:
    """Rows in use of a sliding cache (docs/bundle.md)."""
    group = capacity - WINDOW + 1
    return length if length <= capacity else length - group * -((capacity - length) // group)


class Reference:
    """The target and its drafter in transformers."""

    def __init__(self, tiny: TinyBundle, kind: str) -> None:
        self.target = tiny.reference()
        self.drafter = random_drafter(drafter_config(**KINDS[kind]["drafter"]), seed=0)
        self.capacity = WINDOW + KINDS[kind]["slack"]

    def run(self, ids: list[int]) -> Any:
        with torch.no_grad():
            return self.target.model(
                torch.tensor([ids]), return_shared_kv_states=True, output_hidden_states=True, use_cache=False
            )

    def chain(self, ids: list[int], token: int, count: int) -> list[tuple[int, np.ndarray]]:
        """(token, scores) of `count` guesses after `ids` and `token`, over the rows that a bundle holds."""
        ran, length = self.run(ids), len(ids)
        rows = {S: resident(length, self.capacity), F: length}
        shared = {
            name: tuple(part[:, :, -rows[name] :] for part in parts)
            for name, parts in ran.shared_kv_states.items()
        }
        states, done = ran.hidden_states[-1][:, -1:], []
        for _ in range(count):
            with torch.no_grad():
                row = self.target.model.embed_tokens(torch.tensor([[token]]))
                out = self.drafter(
                    inputs_embeds=torch.cat([row, states], -1),
                    position_ids=torch.tensor([[length]]),
                    shared_kv_states=shared,
                )
            token, states = int(out.logits.argmax()), out.last_hidden_state
            done.append((token, out.logits[0, 0].numpy()))
        return done


@pytest.mark.parametrize("kind", EXACT)
def test_guesses_and_scores_are_transformers(made: Callable[[str], TinyBundle], kind: str):
    """After a prompt and after decode steps with guesses, below and above the window, at every eviction."""
    tiny, ids = made(kind), ids_of(60)
    reference = Reference(tiny, kind)
    session = Session(tiny.bundle, threads=1, longest_draft=4)
    drafter = Drafter(tiny.bundle, session)

    def check(length: int, row: int) -> None:
        token = ids[length]
        expected = reference.chain(ids[:length], token, 3)
        guesses = drafter.guesses(token, length, session.states_after(row))
        for (wanted, scores), guess in zip(expected, guesses, strict=False):
            assert guess.token == wanted, f"after {length} tokens"
            if kind != "centroids":
                probability = np.exp(scores - scores.max())
                assert guess.probability == pytest.approx(1 / probability.sum(), abs=1e-4)
            else:  # transformers gives tokens that are not scored the smallest score, less one
                scored = scores[scores > scores.min() + 0.5]
                assert guess.probability == pytest.approx(1 / np.exp(scored - scored.max()).sum(), abs=1e-3)

    for length in (1, 7, 8, 9, 12, 13, 16):
        session.prefill(np.asarray(ids[:length]), 0, last=True)
        check(length, 0)
    position, drawn = 16, random.Random(1)
    while position < 45:
        right = drawn.randint(0, min(session.caches.ahead(position + 1), 4))
        session.step(ids[position], position, ids[position + 1 : position + 1 + right])
        position += right + 1
        check(position, right)


@pytest.mark.parametrize("kind", EXACT)
def test_guesses_are_those_of_transformers_own_generator(made: Callable[[str], TinyBundle], kind: str):
    tiny, prompt = made(kind), ids_of(15, seed=3)  # of which a cache holds more than the window
    reference = Reference(tiny, kind)
    reference.drafter.generation_config.num_assistant_tokens = 4
    generator = SinglePositionMultiTokenCandidateGenerator(
        reference.drafter, reference.target.model.embed_tokens, GenerationConfig(max_length=CONTEXT)
    )
    ran = reference.run(prompt)
    with torch.no_grad():
        token = int(reference.target.lm_head(ran.hidden_states[-1][:, -1]).argmax())
        ids, _ = generator.get_candidates(torch.tensor([[*prompt, token]]), {}, ran, False, 0)
    session = Session(tiny.bundle, threads=1)
    session.prefill(np.asarray(prompt), 0, last=True)
    assert int(session.logits.argmax()) == token
    guesses = Drafter(tiny.bundle, session).guesses(token, len(prompt), session.states_after(0))
    assert [next(guesses).token for _ in range(4)] == ids[0, len(prompt) + 1 :].tolist()


def scores_of(drafter: Drafter, length: int) -> dict[int, float]:
    """What the head scored in the drafter's last run, by token."""
    feeds = {
        "inputs_embeds": drafter._rows["inputs_embeds"],
        "hidden_states": drafter._states,
        "position_ids": drafter._positions,
        "attention_mask": np.ones((1, length), np.int64),
    }
    for value in drafter._graph.get_inputs():
        if value.name.startswith("past"):
            cache = drafter.session.caches.values[value.name.removeprefix("past_key_values.")]
            feeds[value.name] = cache.numpy()
    ids, scores = drafter._graph.run(["ids", "scores"], feeds)
    return dict(zip(ids[0].tolist(), scores[0, 0].tolist(), strict=True))


def test_quantized_drafters_score_much_the_same(made: Callable[[str], TinyBundle]):
    """4-bit weights over an int8 cache of a model with 4-bit weights: the scores are like the originals."""
    tiny, ids = made("quantized"), ids_of(40)
    session = Session(tiny.bundle, threads=1)
    drafter = Drafter(tiny.bundle, session)
    reference = Reference(tiny, "quantized")
    alike = []
    for length in (5, 12, 16):
        session.prefill(np.asarray(ids[:length]), 0, last=True)
        next(drafter.guesses(ids[length], length, session.states_after(0)))
        ours = scores_of(drafter, length)
        _, scores = reference.chain(ids[:length], ids[length], 1)[0]
        both = [token for token in ours if scores[token] > scores.min() + 0.5]
        assert len(both) >= 16  # one centroid of four at least is the same
        alike.append(np.corrcoef([ours[token] for token in both], scores[both])[0, 1])
    assert min(alike) > 0.5 and np.mean(alike) > 0.8, alike


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, top_k=40, seed=4),
    SamplingParams(temperature=0.8, repetition_penalty=1.3, seed=5),
]


@pytest.mark.parametrize(
    "kind, params",
    [*(("centroids", params) for params in PARAMS), ("quantized", PARAMS[0])],
    ids=["greedy", "drawn", "penalised", "quantized"],  # drawn ones hang on the last bit of 8-bit activations
)
def test_answers_are_the_same(
    made: Callable[[str], TinyBundle], kind: str, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
):
    """With the random drafter, which is never right, and with one that is right most of the time."""
    monkeypatch.setattr(Pace, "has_credit", True)
    monkeypatch.setattr(Pace, "choose_between", lambda pace, chances, most: (0, min(most, pace.longest)))
    monkeypatch.setattr(Pace, "pays", lambda pace, odds, next_odds: True)
    bundle = made(kind).bundle
    plain, guessing = Engine(bundle, threads=1), Engine(bundle, threads=1, speculate=4)
    plain.eos = guessing.eos = frozenset()
    prompt = ids_of(21, seed=2)
    expected = list(plain.generate(prompt, params, max_new_tokens=60))
    assert list(guessing.generate(prompt, params, max_new_tokens=60)) == expected
    assert guessing.last_stats.drafted > 60
    drawn, whole = random.Random(3), [*prompt, *expected, *[7] * 9]

    def oracle(drafter: Drafter, token: int, length: int, states: np.ndarray) -> Iterator[Guess]:
        assert whole[length] == token and np.isfinite(states).all()
        for right in whole[length + 1 :]:
            yield Guess(right if drawn.random() < 0.8 else 9, 0.9)

    monkeypatch.setattr(Drafter, "guesses", oracle)
    assert list(guessing.generate(prompt, params, max_new_tokens=60)) == expected
    stats = guessing.last_stats
    assert stats.accepted >= 10 and stats.decode_steps + stats.accepted == 59


def test_without_it_and_where_nothing_can_be_taken_back(made: Callable[[str], TinyBundle]):
    bundle = made("centroids").bundle
    assert Engine(bundle, speculate=4, drafter=False)._drafter is None
    assert Engine(bundle)._drafter is None
    assert Engine(bundle, speculate=4)._drafter is not None


def test_the_same_bundle_on_genai(made: Callable[[str], TinyBundle]):
    bundle, prompt = made("centroids").bundle, ids_of(16)
    expected = list(Engine(bundle, threads=1).generate(prompt, max_new_tokens=12))
    assert list(GenaiEngine(bundle, threads=1).generate(prompt, max_new_tokens=12)) == expected


def test_what_the_manifest_says(made: Callable[[str], TinyBundle]):
    manifest = made("quantized").bundle.manifest
    drafter = manifest.drafter
    assert drafter is not None and drafter.reads == (1, 2) and drafter.scored == 4 * 512 // 32
    assert manifest.memory.drafter_bytes == drafter.weights_bytes > 0
    assert {"drafter.onnx", "drafter.onnx.data"} <= set(manifest.files)
    bits = {entry.tensor: entry.bits for entry in drafter.quantization}
    assert bits["drafter.layers.0.mlp.up_proj.weight"] == 4
    assert all(entry.relative_error < 0.2 for entry in drafter.quantization)


def test_ask_says_the_same(made: Callable[[str], TinyBundle], capsys: pytest.CaptureFixture[str]):
    said = []
    for options in ([], ["--no-drafter"], ["--speculate", "off"]):
        assert main(["ask", str(made("centroids").path), "Hello", "--max-tokens", "20", *options]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] != ""


# What drafting costs.


def play(pace: Pace, tokens: int, rate: float, drafting_s: float, odds: Callable[[], float]) -> float:
    """Seconds for so many tokens, of a model that is bound by memory, with no text to look up."""
    drawn, spent, made = random.Random(0), 0.0, 0
    while made < tokens:
        _, most = pace.choose_between([], 4) if pace.has_credit else (0, 0)
        run: list[float] = []
        asked = 0
        while asked < most:
            asked += 1
            probability = odds()
            if not pace.pays(run, probability):
                break
            run.append(probability)
        right = 0
        while right < len(run) and drawn.random() < rate:
            right += 1
        took = 0.1 + 0.006 * len(run) + asked * drafting_s
        if asked:
            pace.learn_drafted(run, right, took, asked, asked * drafting_s)
        else:
            pace.learn(0, 0, took)
        spent += took
        made += right + 1
    return spent


@pytest.mark.parametrize("drafting_s", [0.001, 0.02, 0.2])
def test_a_drafter_that_is_wrong_costs_little(drafting_s: float):
    pace = Pace(4)
    tokens, plain = 600, 600 * 0.1
    spent = play(pace, tokens, 0.0, drafting_s, lambda: 0.9)
    # And what is lost before anything is known.
    assert spent < plain * 1.03 + 5 * 4 * (0.006 + drafting_s) + 0.1


def test_a_drafter_that_is_right_pays():
    assert play(Pace(4), 600, 0.9, 0.003, lambda: 0.95) < 0.35 * 60


def test_guesses_with_bad_odds_are_left_out():
    """Of two kinds of guesses only those are run that turn out right."""
    pace, drawn = Pace(4), random.Random(1)
    for _ in range(300):
        pace.learn(0, 0, 0.1)
        good = drawn.random() < 0.5
        pace.learn_drafted([0.97 if good else 0.2], int(good), 0.112, 1, 0.002)
    pace._credit_s = 0.0
    assert pace.choose_between([], 4)[1] >= 0
    assert pace.pays([], 0.97) and not pace.pays([], 0.2)
    assert pace.pays([0.97, 0.97], 0.97) and not pace.pays([0.97], 0.2)


def test_text_or_drafter_whichever_is_faster():
    pace = Pace(4)
    for _ in range(60):
        pace.learn(0, 0, 0.1)
        pace.learn_drafted([0.95] * 3, 3, 0.13, 3, 0.01)
        pace.learn(3, 0, 0.12)
    assert pace.choose_between([0.1] * 4, 4)[0] == 0 < pace.choose_between([0.1] * 4, 4)[1]
    for _ in range(120):
        pace.learn(0, 0, 0.1)
        pace.learn_drafted([0.95] * 3, 0, 0.13, 3, 0.01)
        pace.learn(3, 3, 0.12)
    assert pace.choose_between([0.9] * 4, 4)[1] == 0 < pace.choose_between([0.9] * 4, 4)[0]


# What is refused.


def config_of(**overrides: Any) -> dict[str, Any]:
    return json.loads(json.dumps(drafter_config(**overrides).to_dict(), default=str))


SHAPE = {name: value for name, value in MODEL.items() if name != "seed"}
TARGET = parse_text_model(tiny_config(**SHAPE).to_dict(), "target")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="gemma4_text"), "model_type 'gemma4_text', expected gemma4_assistant"),
        (dict(backbone_hidden_size=128), "backbone_hidden_size is 128, the target's hidden_size is 64"),
        (dict(text_config=dict(vocab_size=1024)), "vocab_size is 1024, the target's vocab_size is 512"),
        (dict(text_config=dict(sliding_window=16)), "sliding_window is 16, the target's sliding_window is 8"),
        (
            dict(text_config=dict(head_dim=32)),
            "1 key/value heads of 32, the target's sliding layers have 1 of 16",
        ),
        (dict(quantization_config=dict(bits=4)), "expected a drafter that is not quantized yet"),
        (
            dict(use_ordered_embeddings=True, num_centroids=100),
            "num_centroids is 100, expected a divisor of 512",
        ),
        (
            dict(use_ordered_embeddings=True, num_centroids=32, centroid_intermediate_top_k=33),
            "centroid_intermediate_top_k is 33, expected 1 to 32",
        ),
        (dict(text_config=None), "without a text_config"),
    ],
)
def test_drafters_of_another_model(change: dict[str, Any], message: str):
    config = config_of()
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) and name in config else value
    with pytest.raises(ConfigError) as error:
        parse_drafter(config, "config.json", TARGET)
    assert message in str(error.value)


def test_weights_that_are_not_whole(tmp_path: Path):
    def prepared(folder: Path) -> Any:
        source = find_checkpoint(str(folder), tokenizer=False)
        return prepare_drafter(source, TARGET, tiny_profile(), load_recipe("int4"))

    folder = write_tiny_drafter(tmp_path, **CENTROIDS)
    assert prepared(folder).order.shape == (32, 16)
    weights = load_file(folder / "model.safetensors")
    twice = weights | {"masked_embedding.token_ordering": torch.zeros(512, dtype=torch.int64)}
    save_file(twice, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not name each of 512 tokens once"):
        prepared(folder)
    del weights["post_projection.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"post_projection\.weight is missing"):
        prepared(folder)


def test_devices_on_which_nothing_is_guessed(tmp_path: Path):
    source = find_checkpoint(str(write_tiny_drafter(tmp_path)), tokenizer=False)
    recipe = load_recipe("int4")
    with pytest.raises(ConfigError, match="runs on cuda, where nothing is guessed"):
        prepare_drafter(source, TARGET, load_profile("jetson-orin-nano-8gb"), recipe)
    with pytest.raises(ConfigError, match="sliding_slack of 0"):
        prepare_drafter(source, TARGET, tiny_profile(slack=0), recipe)


def test_the_budget_counts_it(made: Callable[[str], TinyBundle], tmp_path: Path):
    checkpoint, options = made("centroids").checkpoint, dict(context=CONTEXT, chunk=16, slack=4)
    drafter = made("centroids").checkpoint.parent / "drafter"
    needs = prepare_tiny(checkpoint, tmp_path / "a", **options).plan.memory
    more = prepare_tiny(checkpoint, tmp_path / "b", drafter=drafter, **options).plan.memory
    assert needs.drafter_bytes == 0 < more.drafter_bytes and needs.weights_bytes == more.weights_bytes


def test_export_from_the_command_line(
    made: Callable[[str], TinyBundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint = made("centroids").checkpoint
    wrong = write_tiny_drafter(tmp_path / "wrong", backbone_hidden_size=96)
    command = [
        "export",
        "--model",
        str(checkpoint),
        "--device",
        "x86-64-generic",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--drafter", str(wrong)]) == 1
    assert "backbone_hidden_size is 96" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--drafter", str(tmp_path / "none")]) == 1
    assert "neither a folder nor a Hub id" in capsys.readouterr().err
