"""Soft tokens in the model: prompts in parts against transformers' whole prompt with its sounds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma4AudioFeatureExtractor, Gemma4Config, Gemma4ForConditionalGeneration

from gemma_edge.runtime.audio.encoder import AudioEncoder
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.errors import RequestError
from gemma_edge.runtime.prompt import NOW, Chunks, Part, Soft

from .support.sounds import RATE, speech
from .support.tiny_audio import TINY
from .support.tiny_bundles import TinyBundle

CONTEXT, CHUNK = 256, 16
FIELDS = TINY | dict(subsampling_conv_channels=[128, 4])
HIDDEN = 64

rows = st.integers(1, 20)
parts_of_prompts = st.lists(
    st.one_of(st.lists(st.integers(3, 99), min_size=1, max_size=40), rows.map(lambda n: n), st.just(NOW)),
    min_size=1,
    max_size=12,
)


@given(parts_of_prompts, st.integers(1, 17))
@settings(max_examples=200, deadline=None)
def test_chunks_are_the_prompt(drawn: list, size: int):
    """Numbers drawn stand for as many soft tokens, each row holding its own place in the prompt."""
    parts: list[Part] = []
    ids: list[int] = []
    soft: list[int] = []
    for part in drawn:
        if isinstance(part, int):
            parts.append(
                Soft(np.repeat(np.arange(len(ids), len(ids) + part, dtype=np.float32)[:, None], 4, 1))
            )
            soft += range(len(ids), len(ids) + part)
            ids += [2] * part
        elif part is NOW:
            parts.append(part)
        else:
            parts.append(part)
            ids += part
    chunks = Chunks(parts, size=size, pad=0, placeholder=2, hidden=4)
    if not ids:
        with pytest.raises(RequestError, match="empty"):
            list(chunks)
        return
    done = list(chunks)
    assert [chunk.last for chunk in done] == [False] * (len(done) - 1) + [True]
    assert all(1 <= len(chunk.ids) <= size for chunk in done)
    assert [chunk.position for chunk in done] == np.cumsum([0, *(len(c.ids) for c in done[:-1])]).tolist()
    places = [
        chunk.position + at for chunk in done if chunk.heard is not None for at in chunk.heard.at.tolist()
    ]
    heard = [row for chunk in done if chunk.heard is not None for row in chunk.heard.rows[:, 3].tolist()]
    assert places == heard == soft
    ran = np.concatenate([chunk.ids for chunk in done]).tolist()
    assert ran == [0 if place in set(soft) else token for place, token in enumerate(ids)]
    assert chunks.ids == ids


def test_what_has_arrived_is_run_before_the_next_part_is_waited_for():
    ran: list[int] = []

    def arriving() -> Iterator[Part]:
        yield [5, 6, 7]
        yield NOW
        assert ran == [2]  # all but one row, which the logits may have to come from
        yield Soft(np.zeros((4, 4), np.float32))
        yield NOW
        assert ran == [2, 4]
        yield [8]

    for chunk in Chunks(arriving(), size=16, pad=0, placeholder=2, hidden=4):
        ran.append(len(chunk.ids))
    assert ran == [2, 4, 2]


@pytest.fixture(scope="module")
def tiny(tiny_bundle) -> TinyBundle:
    return tiny_bundle(context=CONTEXT, chunk=CHUNK, model=dict(audio=FIELDS))


def prompt_of(tiny: TinyBundle, clips: list[np.ndarray]) -> list[Part]:
    """Text, a clip, text, … as a dialogue has them, some of the text shorter than a chunk."""
    audio = tiny.bundle.manifest.audio
    assert audio is not None
    rng = np.random.default_rng(len(clips))
    encoder = AudioEncoder(tiny.bundle, threads=1)
    parts: list[Part] = []
    for clip in clips:
        text = rng.integers(30, 500, int(rng.integers(2, 30))).tolist()
        parts += [[*text, audio.tokens.begin], Soft(encoder.encode(clip, RATE)), [audio.tokens.end]]
    return [*parts, rng.integers(30, 500, 5).tolist()]


@pytest.mark.parametrize("count", [1, 2])
def test_greedy_answers_are_transformers_answers(
    tiny: TinyBundle, count: int, monkeypatch: pytest.MonkeyPatch
):
    """Prompts longer than the window and the chunk, with one and two clips, at once and as they arrive."""
    torch.set_num_threads(1)
    clips = [speech()[:9000], speech()[4000:17000]][:count]
    parts = prompt_of(tiny, clips)
    engine = Engine(tiny.bundle)
    monkeypatch.setattr(engine, "eos", frozenset())
    audio = tiny.bundle.manifest.audio
    assert audio is not None
    ids: list[int] = []
    for part in parts:
        ids += [audio.tokens.placeholder] * len(part.rows) if isinstance(part, Soft) else part
    assert len(ids) > CHUNK + 8

    features = Gemma4AudioFeatureExtractor()(clips, return_tensors="pt")
    config = Gemma4Config.from_pretrained(tiny.checkpoint)
    config.vision_config = None  # the tiny checkpoint's vision tower is only there to be skipped
    model = Gemma4ForConditionalGeneration.from_pretrained(
        tiny.checkpoint, config=config, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        expected = model.generate(
            input_ids=torch.tensor([ids]),
            input_features=features.input_features,
            input_features_mask=features.input_features_mask.bool(),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(ids) :].tolist()

    assert list(engine.generate_from(parts, max_new_tokens=30)) == expected
    assert engine.last_stats is not None and engine.last_stats.prompt_tokens == len(ids)
    live = [piece for part in parts for piece in _pieces(part)]
    assert list(engine.generate_from(iter(live), max_new_tokens=30)) == expected
    # What was heard before leaves nothing behind.
    text = list(range(40, 60))
    alone = list(Engine(tiny.bundle).generate(text, max_new_tokens=10))
    assert list(engine.generate(text, max_new_tokens=10))[: len(alone)] == alone


def _pieces(part: Part) -> Iterator[Part]:
    """Soft tokens by threes, each run at once."""
    if isinstance(part, Soft):
        for first in range(0, len(part.rows), 3):
            yield Soft(part.rows[first : first + 3])
            yield NOW
    else:
        yield part


def test_a_prompt_that_grows_beyond_the_context_is_refused(tiny: TinyBundle):
    engine = Engine(tiny.bundle)

    def endless() -> Iterator[Part]:
        while True:
            yield [50] * 20
            yield NOW

    with pytest.raises(RequestError, match="the context holds 256"):
        list(engine.generate_from(endless(), max_new_tokens=8))
    assert list(engine.generate([50, 51], max_new_tokens=3)) is not None


def test_errors_of_a_part_pass_through_and_leave_the_engine_usable(tiny: TinyBundle):
    engine = Engine(tiny.bundle)

    def broken() -> Iterator[Part]:
        yield [50] * 20
        raise OSError("the microphone is gone")

    with pytest.raises(OSError, match="microphone"):
        list(engine.generate_from(broken()))
    assert engine.last_stats is not None and engine.last_stats.finish == "cancelled"
    assert len(list(engine.generate([50, 51], max_new_tokens=3))) <= 3


def test_soft_tokens_of_another_model_are_refused(tiny: TinyBundle):
    with pytest.raises(ValueError, match=r"\(2, 5\), expected \(tokens, 64\)"):
        list(Engine(tiny.bundle).generate_from([[50], Soft(np.zeros((2, 5), np.float32))]))
