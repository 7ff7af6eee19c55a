"""The nano model: a true corpus, a training walk that equals transformers, a checkpoint with its traits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Gemma4ForConditionalGeneration

from gemma_edge.examples.nano_model import evaluate as evaluation
from gemma_edge.examples.nano_model import train as training
from gemma_edge.examples.nano_model.batches import Batches
from gemma_edge.examples.nano_model.commands import random_commands
from gemma_edge.examples.nano_model.corpus import Encoder, random_dialogue
from gemma_edge.examples.nano_model.evaluate import HELD_OUT_SEED
from gemma_edge.examples.nano_model.model import full_config, new_model, save_model
from gemma_edge.examples.nano_model.tokenizer import TEMPLATE
from gemma_edge.examples.nano_model.windows import random_window, reference_summary
from gemma_edge.examples.nano_model.words import HELD_OUT_PLACES, HELD_OUT_SITES, PLACES, SITES
from gemma_edge.examples.sensor_summary.facts import untrue
from gemma_edge.examples.sensor_summary.prompt import Summary

NANO = Path(__file__).parent.parent / "models" / "nano"
seeds = st.integers(0, 10_000_000)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(NANO)


@given(seeds, st.booleans())
@settings(max_examples=200, deadline=None)
def test_reference_summaries_are_true_and_survive_json(seed: int, held_out: bool) -> None:
    window = random_window(random.Random(seed), held_out=held_out)
    summary = reference_summary(window)
    assert untrue(window, summary) == []
    assert msgspec.json.decode(msgspec.json.encode(summary), type=Summary) == summary


@given(seeds)
@settings(max_examples=50, deadline=None)
def test_a_dialogue_comes_from_its_seed_alone(seed: int) -> None:
    assert random_dialogue(random.Random(seed)) == random_dialogue(random.Random(seed))


def test_held_out_words_are_not_in_training() -> None:
    assert not set(HELD_OUT_PLACES) & set(PLACES)
    assert not set(HELD_OUT_SITES) & set(SITES)
    words = {"conservatory", "risotto", "barn door"}  # of the held-out commands
    for seed in range(300):
        text = json.dumps(random_commands(random.Random(seed)))
        assert not any(word in text for word in words)


def test_what_is_learned_is_what_the_model_writes(encoder: Encoder) -> None:
    rng = random.Random(4)
    for _ in range(60):
        messages, tools = random_dialogue(rng)
        ids, learned = encoder.encode(messages, tools)
        text = encoder.tokenizer.decode(ids[learned].tolist(), skip_special_tokens=False)
        # Each turn ends with the token that stops generation.
        written = text.replace("<turn|>", "\0").replace("<|tool_response>", "\0").rstrip("\0").split("\0")
        answers: list[str] = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = encoder.render(messages[:number], tools, prompt=True)
                whole = encoder.render(messages[: number + 1], tools)
                answers.append(whole.removeprefix(prompt).removesuffix("\n").removesuffix("<turn|>"))
        assert written == answers


def test_the_prompt_is_tokenized_as_in_training(encoder: Encoder) -> None:
    """A prompt's ids are a prefix of the whole dialogue's: the model meets in use what it learned."""
    rng = random.Random(5)
    for _ in range(60):
        messages, tools = random_dialogue(rng)
        whole, _ = encoder.encode(messages, tools)
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        prompt = encoder.render(messages[:first], tools, prompt=True)
        ids = encoder.tokenizer.encode(prompt, add_special_tokens=False).ids
        assert whole[: len(ids)].tolist() == ids


def test_transformers_renders_the_template_alike(encoder: Encoder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    rng = random.Random(6)
    for _ in range(20):
        messages, tools = random_dialogue(rng)
        theirs = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
        assert theirs == encoder.render(messages, tools)


def test_the_training_walk_equals_transformers() -> None:
    """Packed rows and blocks of windowed attention: hidden states within 1e-4 (float32, sums reordered)."""
    model = new_model(3).eval()
    batch = next(iter(Batches(NANO, seed=1, rows=1, row=768)))
    masks = training.masks_of(batch["document"], model.config.text_config.sliding_window)
    assert masks["sliding_attention"].shape == (6, 1, 128, 256)
    with torch.no_grad():
        packed = training.forward(model, batch["ids"], batch["position"], masks, training.layer_step)
        for number in range(int(batch["document"].max()) + 1):
            rows = (batch["document"][0] == number).nonzero()[:, 0]
            alone = model.model.language_model(input_ids=batch["ids"][:, rows]).last_hidden_state
            torch.testing.assert_close(packed[:, rows], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spoken_rows", [0, 1])
def test_two_steps_of_training_write_a_checkpoint(
    spoken_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole script, on the CPU: it loads, learns, and writes what transformers loads."""
    command = f"train {tmp_path} --tokenizer {NANO} --init {NANO} --steps 2 --rows 1 --row 768 --workers 0"
    command += f" --no-compile --log-every 1 --round-from 0 --spoken-rows {spoken_rows} --clips 6"
    monkeypatch.setattr("sys.argv", command.split())
    training.main()
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["steps"] == 2 and 0 < report["loss"]["text"] < 1
    assert (report["loss"]["sounds"] > 0) == bool(spoken_rows)
    loaded = Gemma4ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert (loaded.model.audio_tower is not None) == bool(spoken_rows)
    before = Gemma4ForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    change = (loaded.state_dict()[name] - before.state_dict()[name]).abs().max()
    assert 0 < change < 0.1


def test_rounding_is_undone() -> None:
    model = new_model(3)
    before = [parameter.clone() for parameter in model.parameters()]
    rounded = training.RoundedWeights(model)
    with rounded:
        weight = model.model.language_model.layers[0].mlp.up_proj.weight
        levels = weight.view(weight.shape[0], -1, 128)[0, 0].unique()
        assert 2 < len(levels) <= 16
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_saved_model_loads_unchanged_in_transformers(tmp_path: Path) -> None:
    model = new_model(5).eval()
    save_model(model, tmp_path)
    loaded = Gemma4ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.arange(30, 90)[None]
    with torch.no_grad():
        ours = model.to(torch.bfloat16)(ids).logits.float()
        theirs = loaded(ids).logits.float()
    # bfloat16 throughout; the buffers of the rotary embedding are rounded in one and not in the other.
    assert (ours - theirs).abs().max() < 0.25


class TestCheckpoint:
    """The committed folder."""

    def test_is_small_and_has_every_trait_of_e2b(self) -> None:
        assert sum(file.stat().st_size for file in NANO.iterdir()) <= 48 * 2**20
        text = json.loads((NANO / "config.json").read_text())["text_config"]
        made = full_config().to_dict()["text_config"]
        assert all(made[key] == text[key] for key in text if key not in ("dtype", "per_layer_config"))
        types, shared = text["layer_types"], text["num_kv_shared_layers"]
        assert types == (["sliding_attention"] * 4 + ["full_attention"]) * 3
        assert set(types[-shared:]) == set(types[:-shared]) == set(types)
        assert text["use_double_wide_mlp"] and text["tie_word_embeddings"]
        assert text["hidden_size_per_layer_input"] and text["final_logit_softcapping"]

    def test_layer_scalars_are_away_from_one(self) -> None:
        model = Gemma4ForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32)
        scalars = [layer.layer_scalar.item() for layer in model.model.language_model.layers]
        assert np.ptp(scalars) > 0.1 and max(abs(scalar - 1) for scalar in scalars) > 0.1

    def test_its_chat_template_is_the_sources(self) -> None:
        assert (NANO / "chat_template.jinja").read_bytes() == TEMPLATE.read_bytes()

    def test_usual_prompts_are_longer_than_the_window(self, encoder: Encoder) -> None:
        window = json.loads((NANO / "config.json").read_text())["text_config"]["sliding_window"]
        cases = evaluation.cases(encoder, 50)
        assert min(len(case.prompt.ids) for case in cases if case.task == "summary") > window
        assert HELD_OUT_SEED > 10_000_000  # far from the seeds of training


def test_the_int4_bundle_keeps_its_word(nano_bundle: Path, encoder: Encoder) -> None:
    """A small sample of the held-out evaluation, as a floor; the card has the figures of the whole."""
    result = evaluation.evaluate(encoder, evaluation.bundle_generate(nano_bundle), count=25, show=0)
    assert result["summary_percent"] >= FLOOR_PERCENT["summary"]
    assert result["command_percent"] >= FLOOR_PERCENT["command"]
    assert result["question_percent"] >= FLOOR_PERCENT["question"]


# Four standard deviations of 25 draws below the card's figures: at most two wrong.
FLOOR_PERCENT = {"summary": 92, "command": 92, "question": 92}
