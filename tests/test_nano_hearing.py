"""Nano's speech corpus and what training does with it: voices, rooms, lessons, transformers' hearing."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import Gemma4AudioFeatureExtractor

from gemma_edge.examples.nano_model import average, speech, spoken
from gemma_edge.examples.nano_model import evaluate as evaluation
from gemma_edge.examples.nano_model import train as training
from gemma_edge.examples.nano_model.batches import (
    ALPHABET,
    SpokenBatches,
    characters,
    known_words,
    spoken_texts,
)
from gemma_edge.examples.nano_model.corpus import Encoder
from gemma_edge.examples.nano_model.hearing import MAX_SAMPLES, TOKEN, LogMel, Teacher, hear, soft_tokens
from gemma_edge.examples.nano_model.model import load_weights, new_model, save_model
from gemma_edge.examples.nano_model.rooms import disturb

NANO = Path(__file__).parent.parent / "models" / "nano"
SPEAKER = speech.Speaker("en-us+f3", 160, 50, 50)
seeds = st.integers(0, 10_000_000)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(NANO)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return next(iter(SpokenBatches(NANO, seed=1, rows=1, clips=16)))


class TestSpeech:
    def test_training_and_evaluation_share_no_voice_and_no_rate(self):
        rng = random.Random(1)
        trained = [speech.random_speaker(rng) for _ in range(400)]
        held_out = [speech.random_speaker(rng, held_out=True) for _ in range(400)]
        assert not {s.voice.split("+")[1] for s in trained} & {s.voice.split("+")[1] for s in held_out}
        assert not {s.rate for s in trained} & {s.rate for s in held_out}

    @pytest.mark.parametrize("variant", [*speech.VARIANTS, *speech.HELD_OUT_VARIANTS])
    def test_every_voice_speaks(self, variant: str):
        said = speech.say("test", speech.Speaker(f"en-us+{variant}", 180, 50, 50))
        assert 0.1 < len(said.samples) / speech.RATE_HZ < 2
        plain = speech.say("test", speech.Speaker("en-us", 180, 50, 50))
        assert said.samples.tobytes() != plain.samples.tobytes()

    def test_accents_differ(self):
        accents = {*speech.ACCENTS, *speech.HELD_OUT_ACCENTS}
        said = {a: speech.say("Water the garden.", speech.Speaker(f"{a}+m3", 160, 50, 50)) for a in accents}
        assert len({said[accent].samples.tobytes() for accent in accents}) == len(accents)

    def test_sounds_are_timed(self):
        """ "see": s, then i. The hiss has its energy above 3 kHz, the vowel below."""
        said = speech.say("see", SPEAKER)
        classes = [speech.PHONEMES.index(name) + 1 for name in ("s", "i:")]
        assert [number for number in said.sounds.tolist() if number] == classes
        vowel = int(said.starts[1])

        def high(samples: np.ndarray) -> float:
            power = np.abs(np.fft.rfft(samples)) ** 2
            return float(power[len(power) * 3 // 8 :].sum() / power.sum())

        assert high(said.samples[200 : vowel - 200]) > 2 * high(said.samples[vowel + 800 : -800])
        at = said.sounds_at(np.array([-5, 10, vowel + 10, len(said.samples) + 5]))
        assert at.tolist() == [0, *classes, 0]

    def test_resampling_keeps_the_tone(self):
        time_s = np.arange(22_050) / 22_050
        tone = speech.resample(np.sin(2 * np.pi * 1000 * time_s).astype(np.float32), 22_050)
        expected = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
        assert len(tone) == 16_000
        assert np.abs(tone - expected)[200:-200].max() < 0.01

    def test_nothing_to_say_is_an_error(self):
        with pytest.raises(ValueError, match="says nothing"):
            speech.say("  ", SPEAKER)
        with pytest.raises(ValueError, match="no voice 'en-us\\+nobody'"):
            speech.say("test", speech.Speaker("en-us+nobody", 160, 50, 50))


class TestRooms:
    def test_same_seed_same_room(self):
        clip = torch.from_numpy(speech.say("Good morning.", SPEAKER).samples)[None]
        length = torch.tensor([clip.shape[1]])
        assert torch.equal(disturb(clip, length, 4), disturb(clip, length, 4))
        assert not torch.allclose(disturb(clip, length, 4), disturb(clip, length, 5))

    def test_without_strength_only_the_gain_changes(self):
        clip = torch.from_numpy(speech.say("Good morning.", SPEAKER).samples)[None]
        heard = disturb(clip, torch.tensor([clip.shape[1]]), 4, strength=0.0)
        gain = heard.abs().max() / clip.abs().max()
        assert 10 ** (-26 / 20) <= gain <= 10 ** (-1 / 20)
        assert (heard - gain * clip).abs().max() < 1e-4

    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_speech_stays_on_top_of_the_noise(self, seed: int):
        clip = torch.from_numpy(speech.say("Good morning.", SPEAKER).samples)[None]
        heard = disturb(clip, torch.tensor([clip.shape[1]]), seed)[0]
        assert heard.abs().max() <= 10 ** (-1 / 20) + 1e-4
        assert torch.isfinite(heard).all()
        similar = torch.fft.irfft(torch.fft.rfft(heard, 65536) * torch.fft.rfft(clip[0], 65536).conj())
        assert similar[:64].max() == similar.max()  # nothing is moved


class TestDialogues:
    @given(seeds, st.booleans())
    @settings(max_examples=100, deadline=None)
    def test_held_out_sentences_are_never_said_in_training(self, seed: int, held_out: bool):
        messages, _ = spoken.spoken_dialogue(random.Random(seed), held_out=held_out)
        texts = spoken_texts(messages)
        assert texts
        free = {spoken.written(text) for text in spoken._GREETINGS}
        assert all(spoken.is_held_out(text) == held_out for text in texts if text not in free)

    @given(seeds)
    @settings(max_examples=100, deadline=None)
    def test_transcripts_hold_what_can_be_heard(self, seed: int):
        prompt, answer = spoken.transcript_dialogue(random.Random(seed))
        assert answer["content"] == prompt["content"][1]["say"]
        assert set(answer["content"][:-1].lower()) <= set(ALPHABET) and answer["content"][-1] in ".?"

    def test_written_form(self):
        assert spoken.written("brightness 40% in the hall") == "Brightness 40 percent in the hall."
        assert spoken.written("What does bed 3 level read?") == "What does bed 3 level read?"
        assert spoken.written("Wake me at 06:45.") == "Wake me at 06:45."
        assert spoken.written("Water bed 2 for 5 min") == "Water bed 2 for 5 minutes."

    def test_characters_are_numbered(self):
        assert characters(["Ab 1."], 2)[:, :5].tolist() == [[2, 3, 1, 29, 0], [0, 0, 0, 0, 0]]


class TestHearing:
    def test_frames_are_transformers_frames(self, batch: dict[str, torch.Tensor]):
        """Float32 on the GPU against the extractor's float64: 1e-3 of values from -7 to 6."""
        clips = batch["clips"].float() / 32768
        mel, valid = LogMel()(clips, batch["samples"])
        extractor = Gemma4AudioFeatureExtractor()
        for row in range(4):
            samples = int(batch["samples"][row])
            out = extractor([clips[row, :samples].numpy()], return_tensors="pt")
            mask = out.input_features_mask[0].bool()
            assert int(mask.sum()) == int(valid[row].sum())
            assert (out.input_features[0][mask] - mel[row][valid[row]]).abs().max() < 1e-3

    def test_the_training_walk_equals_transformers(self, batch: dict[str, torch.Tensor]):
        """A packed row with soft tokens in it: logits of its first dialogue within 1e-3."""
        model = new_model(3, ears=True).eval()
        load_weights(model, NANO)
        mel, valid = LogMel()(batch["clips"].float() / 32768, batch["samples"])
        masks = training.masks_of(batch["document"], model.config.text_config.sliding_window)
        with torch.no_grad():
            _, mask, soft = hear(model, mel, valid)
            counts = [soft_tokens(n) for n in batch["samples"].tolist() if n]
            assert mask.sum(1).tolist()[: len(counts)] == counts
            hidden = training.forward(
                model, batch["ids"], batch["position"], masks, training.layer_step, soft
            )
            rows = (batch["document"][0] == 0).nonzero()[:, 0]
            ids = batch["ids"][:, rows]
            placeholders, clips = int((ids == model.config.audio_token_id).sum()), 0
            while sum(counts[:clips]) < placeholders:
                clips += 1
            theirs = model(
                input_ids=ids, input_features=mel[:clips], input_features_mask=valid[:clips]
            ).logits
            ours = torch.tanh(model.lm_head(hidden[:, rows]) / 30) * 30
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)

    def test_lessons_know_their_answers(self, batch: dict[str, torch.Tensor]):
        """A teacher whose heads are given the answers has nothing left to teach."""
        sounds, said = batch["sounds"], batch["said"]
        assert (batch["samples"] > 0).any()
        mask = torch.zeros(sounds.shape, dtype=torch.bool)
        for row, samples in enumerate(batch["samples"].tolist()):
            mask[row, : soft_tokens(samples)] = samples > 0
        assert ((sounds >= 0) | ~mask).float().mean() > 0.98
        teacher = Teacher(sounds.shape[1], 8, 100, len(ALPHABET))
        heard = torch.zeros(*sounds.shape, sounds.shape[1])
        made, spelled = teacher.losses(heard, mask, sounds, said)
        assert made > 3 and spelled > 3
        with torch.no_grad():
            teacher = Teacher(101, 8, 100, len(ALPHABET))
            teacher.sounds.weight.copy_(30 * torch.eye(101))
            teacher.sounds.bias.zero_()
        made, _ = teacher.losses(torch.eye(101)[sounds.clamp_min(0)], mask, sounds, said)
        assert made < 1e-3
        table, words = torch.eye(64)[:32], batch["words"][mask] % 32
        teacher = Teacher(8, 64, 100, len(ALPHABET))
        with torch.no_grad():
            teacher.silence.weight.copy_(60 * torch.eye(64)[63])
            teacher.sharpness.fill_(4)
        soft = torch.where((words == 0)[:, None], torch.eye(64)[63], torch.eye(64)[words])
        assert teacher.words_loss(soft, words, table) < 1e-3
        assert teacher.words_loss(soft.roll(1, 0), words, table) > 3

    @given(seeds)
    @settings(max_examples=50, deadline=None)
    def test_words_are_known_when_they_have_been_said(self, encoder: Encoder, seed: int):
        """In order, all of them, none before its end unless the clip is too short for the rest."""
        rng = random.Random(seed)
        text = spoken.transcript_dialogue(rng)[-1]["content"]
        said = speech.say(text, speech.random_speaker(rng))
        assert len(said.ends) == len(text.split()) and (np.diff(said.ends) >= 0).all()
        assert said.ends[0] > 0 and said.ends[-1] <= len(said.samples)
        tokens = encoder.tokenizer.encode(text, add_special_tokens=False).ids
        long = known_words(encoder, text, said.ends, len(said.samples) // TOKEN + 40)
        assert [token for token in long.tolist() if token] == tokens
        assert int(np.flatnonzero(long)[-1]) * TOKEN >= said.ends[-1]
        short = known_words(encoder, text, said.ends, len(said.samples) // TOKEN + 1)
        assert [token for token in short.tolist() if token] == tokens
        first, whole = np.flatnonzero(long), np.flatnonzero(short)
        assert (whole <= first).all()

    def test_a_clip_is_where_its_sounds_say(self, batch: dict[str, torch.Tensor]):
        """Silence before and after the speech, in the samples and in the lesson."""
        for clip, samples, sounds in zip(batch["clips"], batch["samples"], batch["sounds"], strict=True):
            if samples:
                heard = sounds[: soft_tokens(int(samples))]
                assert int(heard[0]) == 0 and clip[: TOKEN // 2].abs().max() == 0
                loud = (clip != 0).nonzero()[:, 0]
                first = (heard != 0).nonzero()[0, 0]
                assert abs(int(first) * TOKEN - int(loud[0])) < 4 * TOKEN
        assert batch["clips"].shape[1] == MAX_SAMPLES


def test_word_errors():
    count = evaluation.word_errors
    assert count("turn on the light".split(), "turn on the light".split()) == 0
    assert count("turn on the light".split(), "turn the lights".split()) == 2
    assert count(["a"], []) == 1 and count([], ["a", "b"]) == 2
    assert evaluation.plain_words("What's bed 3, at 06:45?") == ["what", "s", "bed", "3", "at", "06:45"]


def test_spoken_cases_are_heard_as_they_are_counted(encoder: Encoder):
    for case in evaluation.cases(encoder, 2, spoken=True):
        placeholders = case.prompt.ids.count(encoder.audio)
        assert placeholders == sum(soft_tokens(len(clip)) for clip in case.prompt.clips)
        assert bool(case.prompt.clips) == (case.task in ("transcript", "spoken_command"))


class TestAverage:
    """Two small stages of one training, with and without ears."""

    @pytest.fixture(scope="class")
    def stages(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("stages")
        for name, value in (("one", 1.0), ("two", 3.0)):
            model = new_model(0, ears=True)
            for tensor in model.state_dict().values():
                tensor.fill_(value)
            save_model(model, folder / name)
        return folder / "one", folder / "two"

    def test_each_part_has_its_share(self, stages: tuple[Path, Path], tmp_path: Path):
        average.average(*stages, tmp_path, text=0.25, audio=0.75)
        files = sorted(tmp_path.glob("*.safetensors"))
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        heard = {name for name in weights if "audio" in name}
        assert heard and set(weights) - heard
        assert all((weights[name] == 2.5).all() for name in heard)
        assert all((weights[name] == 1.5).all() for name in set(weights) - heard)
        load_weights(new_model(1, ears=True), tmp_path)  # a checkpoint as training writes it

    def test_the_ends_are_the_checkpoints(self, stages: tuple[Path, Path], tmp_path: Path):
        average.average(*stages, tmp_path, text=0.0, audio=0.0)
        for file in sorted(stages[0].iterdir()):
            assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name

    def test_a_first_stage_without_ears_takes_the_seconds(self, stages: tuple[Path, Path], tmp_path: Path):
        deaf = new_model(0)
        for tensor in deaf.state_dict().values():
            tensor.fill_(1.0)
        save_model(deaf, tmp_path / "deaf")
        average.average(tmp_path / "deaf", stages[1], tmp_path / "out", text=0.75, audio=0.25)
        for file in (tmp_path / "out").glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                assert (tensor == (3.0 if "audio" in name else 2.5)).all(), name

    def test_other_shapes_are_refused(self, stages: tuple[Path, Path], tmp_path: Path):
        save_model(new_model(0), tmp_path / "deaf")
        with pytest.raises(ValueError, match="expected two stages of one training"):
            average.average(stages[0], tmp_path / "deaf", tmp_path / "out", text=0.5, audio=0.5)
        assert not (tmp_path / "out").exists()
