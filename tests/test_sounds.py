"""Sounds of requests: taken from messages, fed while spoken, heard by a real encoder and engine."""

from __future__ import annotations

import base64
import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from gemma_edge.runtime import sounds as module
from gemma_edge.runtime.audio.encoder import AudioEncoder
from gemma_edge.runtime.chat import ChatTemplate, load_template
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.errors import AudioError, RequestError
from gemma_edge.runtime.prompt import Soft
from gemma_edge.runtime.service import ChatRequest, Done, Event, Failed, Service, TextDelta
from gemma_edge.runtime.sounds import Ears, Feed, take_sounds
from gemma_edge.runtime.tokenizer import load_tokenizer

from .support.sounds import RATE, SPEECH, speech
from .support.tiny_audio import TINY
from .support.tiny_bundles import TinyBundle

FIELDS = TINY | dict(subsampling_conv_channels=[128, 4])
NEVER = threading.Event()


def part(data: bytes) -> dict:
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"},
    }


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def user(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def text(words: str) -> dict:
    return {"type": "text", "text": words}


class TestTaking:
    def test_sounds_come_out_in_order(self):
        feed = Feed(RATE)
        messages = [
            {"role": "system", "content": "Listen."},
            *user(text("first"), part(b"1"), part(b"2")),
            *user({"type": "audio", "feed": feed}),
        ]
        taken, sounds = take_sounds(messages)
        assert sounds == [b"1", b"2", feed]
        assert taken[0] == messages[0]
        assert [p["type"] for p in taken[1]["content"]] == ["text", "audio", "audio"]
        assert messages[1]["content"][1]["type"] == "input_audio"  # the caller's are as they were

    @pytest.mark.parametrize(
        ("field", "said"),
        [
            (None, "expected {'data'"),
            ({"data": ""}, "expected {'data'"),
            ({"data": 5}, "expected {'data'"),
            ({"data": "not base64!"}, "not base64"),
        ],
    )
    def test_what_is_no_sound_is_refused(self, field, said: str):
        with pytest.raises(RequestError, match=said) as error:
            take_sounds(user({"type": "input_audio", "input_audio": field}))
        assert error.value.code == "invalid_request"

    def test_files_within_the_process_need_no_base64(self):
        taken, sounds = take_sounds(user({"type": "audio", "file": b"bytes"}))
        assert sounds == [b"bytes"] and taken[0]["content"] == [{"type": "audio"}]

    def test_clients_cannot_send_the_inner_part(self):
        with pytest.raises(RequestError, match="'input_audio'"):
            take_sounds(user({"type": "audio", "feed": "anything"}))

    def test_too_many_and_too_much(self, monkeypatch: pytest.MonkeyPatch):
        with pytest.raises(RequestError, match="at most 16"):
            take_sounds(user(*[part(b"x")] * 17))
        monkeypatch.setattr(module, "MAX_SOUND_BYTES", 10)
        with pytest.raises(RequestError, match="at most 16 of 10 bytes"):
            take_sounds(user(part(b"123456"), part(b"123456")))
        with pytest.raises(RequestError, match="more than 10 bytes"):
            take_sounds(user(part(b"x" * 30)))


class TestFeeding:
    def test_blocks_arrive_in_order_and_none_says_that_no_more_is_there(self):
        feed = Feed(RATE)
        for value in (1, 2):
            feed.put(np.full(10, value, np.int16))
        blocks = feed.blocks(NEVER)
        assert next(blocks).tolist() == [1] * 10 + [2] * 10, "what has piled up comes at once"
        assert next(blocks) is None
        feed.put(np.full(10, 3, np.int16))
        feed.end()
        assert [block.tolist() for block in blocks if block is not None] == [[3] * 10]

    def test_the_end_is_the_end(self):
        feed = Feed(RATE)
        feed.end()
        with pytest.raises(AudioError, match="has ended"):
            feed.put(np.zeros(1, np.int16))
        assert list(feed.blocks(NEVER)) == [] and feed.ended_at is not None

    def test_its_length_is_bounded(self):
        feed = Feed(RATE, max_s=1.0)
        feed.put(np.zeros(RATE, np.int16))
        with pytest.raises(AudioError, match="more than 1 s"):
            feed.put(np.zeros(1, np.int16))
        with pytest.raises(AudioError, match="more than 1 s"):
            list(feed.blocks(NEVER))

    def test_failing_and_silence_reach_the_reader(self, monkeypatch: pytest.MonkeyPatch):
        feed = Feed(RATE)
        feed.fail(RequestError("cancelled", "the line is dead"))
        with pytest.raises(RequestError, match="dead"):
            list(feed.blocks(NEVER))
        monkeypatch.setattr(module, "FEED_IDLE_S", 0.2)
        with pytest.raises(AudioError, match="no sound came"):
            list(Feed(RATE).blocks(NEVER))

    def test_a_stopped_reader_stops_waiting(self):
        stop = threading.Event()
        threading.Timer(0.1, stop.set).start()
        assert list(Feed(RATE).blocks(stop)) == []


@pytest.fixture(scope="module")
def tiny(tiny_bundle) -> TinyBundle:
    return tiny_bundle(context=512, chunk=32, model=dict(audio=FIELDS))


@pytest.fixture(scope="module")
def service(tiny: TinyBundle):
    bundle = tiny.bundle
    ears = Ears(AudioEncoder(bundle, threads=1))
    engine = Engine(bundle)
    with Service(
        engine, load_tokenizer(bundle), load_template(bundle), model_name="tiny", ears=ears
    ) as service:
        yield service


def ask(service: Service, messages: list[dict], **rest) -> list[Event]:
    return list(service.submit(ChatRequest(messages, max_tokens=12, **rest)).events())


def words(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


class TestHearing:
    def test_parts_stand_where_the_placeholders_stood(self, service: Service):
        ears = service.ears
        assert ears is not None
        tokens = ears.tokens
        prompt = [5, tokens.placeholder, 6, 7, tokens.placeholder, 8]
        clips = [speech()[:8000], speech()[8000:20000]]
        first, soft, between, second, last = ears.parts(prompt, [wav(clip) for clip in clips], NEVER)
        assert first == [5, tokens.begin]
        assert between == [tokens.end, 6, 7, tokens.begin]
        assert last == [tokens.end, 8]
        for got, clip in ((soft, clips[0]), (second, clips[1])):
            assert isinstance(got, Soft)
            assert np.abs(got.rows - ears.encoder.encode(clip, RATE)).max() < 1e-5

    def test_a_file_and_the_same_sound_live_get_the_same_answer(self, service: Service):
        clip = (speech()[:24000] * 32767).astype(np.int16)
        whole = ask(service, user(text("Transcribe this."), part(wav(clip / 32768.0))))
        assert isinstance(whole[-1], Done)
        feed = Feed(RATE, max_s=5)
        job = service.submit(
            ChatRequest(user(text("Transcribe this."), {"type": "audio", "feed": feed}), max_tokens=12)
        )
        for start in range(0, len(clip), 1600):
            feed.put(clip[start : start + 1600])
            time.sleep(0.005)
        feed.end()
        live = list(job.events())
        assert words(live) == words(whole)
        done = live[-1]
        assert isinstance(done, Done) and done.usage == whole[-1].usage
        assert done.usage.prompt_tokens > len(clip) / RATE * 25
        assert done.stats is not None and done.stats.complete_s > 0.05

    def test_a_feed_that_was_heard_is_not_encoded_again(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ):
        feed = Feed(RATE, max_s=5)
        feed.put((speech()[:24000] * 32767).astype(np.int16))
        feed.end()
        assert service.ears is not None and service.ears.check(feed) == 3  # its length is not known yet
        started = time.perf_counter()
        job = service.submit(ChatRequest(user({"type": "audio", "feed": feed}), max_tokens=12))
        first = list(job.events())
        assert job.first_token_at is not None and started < job.first_token_at < time.perf_counter()
        assert feed.soft is not None and service.ears.check(feed) == 2 + len(feed.soft)
        monkeypatch.setattr(service.ears.encoder, "stream", None)
        again = ask(service, user({"type": "audio", "feed": feed}))
        assert words(again) == words(first)
        assert isinstance(first[-1], Done) and isinstance(again[-1], Done)
        assert again[-1].usage == first[-1].usage

    def test_flac_at_another_rate(self, service: Service):
        done = ask(service, user(part(SPEECH.read_bytes())))[-1]
        assert isinstance(done, Done) and done.usage.prompt_tokens > 6 * 25

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"RIFF....", "not a sound file"),
            (wav(np.zeros((RATE * 31, 1), np.float32)), "cut it into clips"),
        ],
    )
    def test_bad_sounds_are_refused_at_once(self, service: Service, data: bytes, said: str):
        with pytest.raises(AudioError, match=said):
            service.submit(ChatRequest(user(part(data))))

    def test_a_sound_without_content_fails_and_the_next_request_works(self, service: Service):
        last = ask(service, user(part(wav(np.zeros(50, np.float32)))))[-1]
        assert isinstance(last, Failed) and "too short" in last.message
        broken = wav(np.full(RATE, np.nan, np.float32))
        last = ask(service, user(part(broken)))[-1]
        assert isinstance(last, Failed) and last.code == "invalid_request"
        assert isinstance(ask(service, user(text("Hello")))[-1], Done)

    def test_more_sound_than_the_context_is_refused(self, service: Service):
        long = wav(np.zeros(RATE * 25, np.float32))
        with pytest.raises(RequestError) as error:
            service.submit(ChatRequest(user(part(long))))
        assert error.value.code == "context_length_exceeded"

    def test_an_answer_ends_after_some_tokens_however_much_fits(self, service: Service):
        feed = Feed(RATE)
        feed.put((speech() * 32767).astype(np.int16))
        feed.end()
        spoken = list(
            service.submit(ChatRequest(user({"type": "audio", "feed": feed}), stop_after=3)).events()
        )
        assert isinstance(spoken[-1], Done) and spoken[-1].usage.completion_tokens == 3
        assert spoken[-1].finish_reason == "length"
        clip = user(part(wav(speech()[:8000])))
        last = list(service.submit(ChatRequest(clip, stop_after=10_000)).events())[-1]
        assert isinstance(last, Done)

    def test_cancelling_while_somebody_speaks(self, service: Service):
        feed = Feed(RATE)
        job = service.submit(ChatRequest(user({"type": "audio", "feed": feed})))
        feed.put(np.zeros(RATE // 2, np.int16))
        time.sleep(0.1)
        job.cancel()
        last = list(job.events())[-1]
        assert isinstance(last, Done) and last.finish_reason == "cancelled"
        assert isinstance(ask(service, user(text("Hello")))[-1], Done)

    def test_a_deadline_while_somebody_speaks(self, service: Service):
        job = service.submit(ChatRequest(user({"type": "audio", "feed": Feed(RATE)}), timeout_s=0.2))
        last = list(job.events())[-1]
        assert isinstance(last, Failed) and last.code == "timeout"

    def test_a_daemon_without_ears_says_so(self, tiny: TinyBundle, service: Service):
        bundle = tiny.bundle
        engine = Engine(bundle)
        with (
            Service(engine, load_tokenizer(bundle), load_template(bundle), model_name="deaf") as deaf,
            pytest.raises(RequestError, match="hears nothing"),
        ):
            deaf.submit(ChatRequest(user(part(SPEECH.read_bytes()))))


def test_a_template_without_a_place_for_sounds(tiny: TinyBundle, service: Service):
    bundle = tiny.bundle
    text_only = ChatTemplate("{% for m in messages %}{{ m.content | string }}{% endfor %}", {})
    with (
        Service(
            Engine(bundle), load_tokenizer(bundle), text_only, model_name="x", ears=service.ears
        ) as other,
        pytest.raises(RequestError, match="no place for these sounds"),
    ):
        other.submit(ChatRequest(user(part(SPEECH.read_bytes()))))


def test_typed_placeholders_are_text(tiny: TinyBundle, service: Service):
    """`<|audio|>` typed by a user opens no ear: no sound is missing and none is moved."""
    assert Path(tiny.path).is_dir()
    events = ask(service, user(text("What does <|audio|> mean?"), part(wav(speech()[:8000]))))
    assert isinstance(events[-1], Done)
