"""The voice assistant's dialogue: spoken turns, tools that act on a real broker, barge-in, memory."""

from __future__ import annotations

import threading
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gemma_edge.examples.voice_assistant import __main__ as program
from gemma_edge.examples.voice_assistant import microphone
from gemma_edge.examples.voice_assistant.assistant import Assistant
from gemma_edge.examples.voice_assistant.config import Config, load_config
from gemma_edge.examples.voice_assistant.home import Home, Outcome
from gemma_edge.examples.voice_assistant.listener import VoiceListener
from gemma_edge.examples.voice_assistant.microphone import Recording
from gemma_edge.examples.voice_assistant.speaker import Speaker, WavFile
from gemma_edge.examples.voice_assistant.voices import open_voice
from gemma_edge.runtime.errors import ConfigError

from .support.brokers import mosquitto
from .support.hearing import hearing_bundle
from .support.mqtt_peer import peer
from .support.voice_assistant import HearingEngine, Seen, hearing_brain, last_turn, recording

HOME = Path(program.__file__).parent / "home.yaml"

LIGHT = "Turn on the light in the kitchen."
HEAT = "Make it nineteen degrees in the bedroom."
ATTIC = "It is dark in the attic."
TANK = "What does the tank level read?"
STORY = "Tell me a long story, please."
THANKS = "Thank you very much, good night."
PHRASES = (LIGHT, HEAT, ATTIC, TANK, STORY, THANKS)
PAUSE = 1.2  # s, more than the silence that ends a turn


def call(name: str, **arguments: Any) -> str:
    words = [
        f"{key}:{value}" if isinstance(value, int) else f'{key}:<|"|>{value}<|"|>'
        for key, value in arguments.items()
    ]
    return f"<|tool_call>call:{name}{{{','.join(words)}}}<tool_call|>"


def script(prompt: str) -> str:
    """Calls a tool for what was heard, and says what came of it."""
    user, model = last_turn(prompt)
    if "<tool_response|>" in model:
        result = model.rpartition("<|tool_response>")[2]
        if "error:" in result:
            return "That failed."
        value = result.partition('value:<|"|>')[2].partition("<|")[0]
        return f"It is {value}." if value else "Done."
    return {
        LIGHT: call("switch_light", room="kitchen", state="on"),
        HEAT: call("set_temperature", room="bedroom", celsius=19),
        ATTIC: call("switch_light", room="attic", state="on"),
        TANK: call("read_sensor", sensor="tank level"),
        STORY: " ".join(f"This is sentence number {n} of a long story." for n in range(1, 30)),
        THANKS: "Good night.",
    }.get(user, f"I heard {user}.")


def config_for(broker: str, **answer: Any) -> Config:
    config = load_config(HOME)
    replace = msgspec.structs.replace
    return replace(config, broker=broker, answer=replace(config.answer, **answer))


class NoHome:
    """Without tools."""

    declarations: list[dict[str, Any]] = []  # noqa: RUF012 - it stays empty

    def call(self, name: str, arguments: dict[str, Any]) -> Outcome:
        raise AssertionError(name)


@contextmanager
def listening(
    wav: Path,
    *,
    home: Any = None,
    speaker: Speaker | None = None,
    config: Config | None = None,
    speed: float = 16.0,
    wait: bool = True,
    answer: Callable[[str], str] = script,
    **brain: Any,
) -> Iterator[tuple[Seen, HearingEngine, Assistant]]:
    """The assistant after it has listened to a recording."""
    seen = Seen()
    config = config or config_for("mqtt://localhost")
    with hearing_brain(PHRASES, answer, **brain) as (model, engine):
        assistant = Assistant(config, model, home or NoHome(), speaker or Speaker(None, None), seen)
        listener = VoiceListener(config.listen, assistant.longest_s)
        assistant.listen(Recording(wav, speed), listener, wait=wait)
        yield seen, engine, assistant
        assistant.close()


def test_a_spoken_dialogue_acts_on_the_home(tmp_path: Path) -> None:
    """Five sentences, a real detector, real time but faster, a real broker: each acts or is answered."""
    wav = recording(tmp_path / "talk.wav", 0.5, LIGHT, PAUSE, TANK, PAUSE, ATTIC, PAUSE, HEAT, PAUSE, THANKS)
    spoken = tmp_path / "answers.wav"
    with mosquitto(tmp_path) as broker, peer(broker.port, "home/#", "zigbee2mqtt/#") as world:
        world.send("64 %", topic="home/tank/level", retain=True)
        config = config_for(f"mqtt://127.0.0.1:{broker.port}")
        voice = open_voice(config.speak, "espeak")
        with Home(config) as home:
            assert home.wait_online(10)
            speaker = Speaker(voice, WavFile(spoken))
            with listening(wav, home=home, speaker=speaker, config=config) as (seen, engine, _):
                speaker.close()
        sent = {m.topic: bytes(m.payload) for m in world.wait(3)}
    assert [line for line in seen.lines if not line.startswith(("heard", "finished"))] == [
        "called switch_light: home/kitchen/light/set ON",
        "said Done.",
        "called read_sensor: home/tank/level: 64 %",
        "said It is 64 %.",
        "called switch_light: room: there is no 'attic'; known: kitchen, living room, bedroom, bathroom, "
        "office, hallway",
        "said That failed.",
        'called set_temperature: zigbee2mqtt/bedroom_thermostat/set {"system_mode":"heat",'
        '"occupied_heating_setpoint":19}',
        "said Done.",
        "said Good night.",
    ]
    assert sent == {
        "home/tank/level": b"64 %",
        "home/kitchen/light/set": b"ON",
        "zigbee2mqtt/bedroom_thermostat/set": b'{"system_mode":"heat","occupied_heating_setpoint":19}',
    }
    assert [turn.number for turn in seen.turns] == [1, 2, 3, 4, 5]
    for index, turn in enumerate(seen.turns):
        assert turn.error is None and not turn.interrupted
        assert turn.token_s is not None and turn.sound_s is not None and 0 < turn.token_s < turn.sound_s
        assert turn.speech_s > 1.0
        # Heard while it was spoken: the first soft tokens were there before the end.
        assert engine.first_sound_at[sum(1 + len(t.calls) for t in seen.turns[:index])] < turn.ended_at
    with wave.open(str(spoken)) as file:
        assert file.getnframes() / file.getframerate() > 2.0
    # The last prompt holds the whole dialogue, its sounds too.
    for phrase in (LIGHT, TANK, ATTIC, HEAT, THANKS):
        assert f"⟨{phrase}⟩" in engine.prompts[-1]
    assert "It is 64 %." in engine.prompts[-1]


def test_speaking_stops_the_answer(tmp_path: Path) -> None:
    """Barge-in: the answer ends in the middle, and the model is told what was heard of it."""
    wav = recording(tmp_path / "talk.wav", 0.5, STORY, 5.0, THANKS, 0.1)
    spoken = tmp_path / "answers.wav"
    config = config_for("mqtt://localhost", max_tokens=1000)
    speaker = Speaker(open_voice(config.speak, "espeak"), WavFile(spoken, speed=4.0))
    with listening(wav, speaker=speaker, config=config, speed=4.0, wait=False, step_s=0.002) as (
        seen,
        engine,
        _,
    ):
        speaker.close()
    story, thanks = seen.turns
    assert story.interrupted and not thanks.interrupted
    assert "sentence number 1 " in story.said and "number 29" not in story.said
    assert thanks.answer == "Good night."
    with wave.open(str(spoken)) as file:
        assert 2.0 < file.getnframes() / file.getframerate() < 9.0
    told = engine.prompts[-1]
    assert f"⟨{STORY}⟩" in told and f"{story.said} …<turn|>" in told


def test_a_pause_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    """Who goes on speaking before there is an answer is understood with what was said before."""
    wav = recording(tmp_path / "talk.wav", 0.5, STORY, 0.9, THANKS, 0.1)

    def slowly(prompt: str) -> str:
        if THANKS in prompt:
            return "Good night."
        time.sleep(1.0)
        return "Once upon a time."

    with listening(wav, speed=4.0, wait=False, answer=slowly) as (seen, engine, _):
        pass
    first, second = seen.turns
    assert first.interrupted and not first.said and len(second.before) == 1
    assert f"<|turn>user\n<|audio>⟨{STORY}⟩<audio|><|audio>⟨{THANKS}⟩<audio|><turn|>" in engine.prompts[-1]
    assert second.answer == "Good night."


def test_without_barge_in_it_is_deaf_while_it_answers(tmp_path: Path) -> None:
    wav = recording(tmp_path / "talk.wav", 0.5, LIGHT, 0.8, STORY, 3.0, THANKS, 0.1)
    config = config_for("mqtt://localhost")
    seen = Seen()

    def answer(prompt: str) -> str:
        time.sleep(1.2 if last_turn(prompt)[0] == LIGHT else 0.0)
        return "Yes."

    with hearing_brain(PHRASES, answer) as (model, engine):
        assistant = Assistant(config, model, NoHome(), Speaker(None, None), seen)
        listener = VoiceListener(config.listen, assistant.longest_s)
        assistant.listen(Recording(wav, 4.0), listener, barge_in=False)
    assert [turn.interrupted for turn in seen.turns] == [False, False]
    assert len(engine.prompts) == 2 and f"⟨{STORY}⟩" not in engine.prompts[1]


def test_noise_that_is_no_speech_asks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "noise.wav"
    random = np.random.default_rng(0)
    sound = (random.normal(size=32000) * 3000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(sound.tobytes())
    with listening(path, speed=0.0) as (seen, engine, _):
        pass
    assert seen.lines == [] and engine.prompts == []


def test_old_turns_are_forgotten_when_the_context_is_full() -> None:
    seen = Seen()
    config = config_for("mqtt://localhost", max_tokens=32)
    with hearing_brain(PHRASES, lambda prompt: "Yes indeed.", context=512) as (model, engine):
        assistant = Assistant(config, model, NoHome(), Speaker(None, None), seen)
        for number in range(12):
            assistant.type(f"This is a typed sentence, and its number is {number}; remember it well.")
            assistant.wait()
        assistant.type("x" * 3000)
        assistant.type("And now?")
        assistant.wait()
    assert len(seen.turns) == 14
    assert [turn.error for turn in seen.turns if turn.error] == ["that is too long for the model's context"]
    assert "number is 11" in engine.prompts[-1] and "number is 0;" not in engine.prompts[-1]
    assert 0 < len(assistant.conversation) < 12


def test_a_small_context_shortens_turns_and_a_tiny_one_is_refused() -> None:
    config = config_for("mqtt://localhost", max_tokens=32)
    with hearing_brain(PHRASES, script, context=400) as (model, _):
        assistant = Assistant(config, model, NoHome(), Speaker(None, None), Seen())
        assert 5 < assistant.longest_s < 12
    with (
        hearing_brain(PHRASES, script, context=160) as (model, _),
        pytest.raises(ConfigError, match=r"the context holds 160 tokens: .* Declare fewer tools"),
    ):
        Assistant(config, model, NoHome(), Speaker(None, None), Seen())


def test_transcripts_replace_sounds_in_the_memory(tmp_path: Path) -> None:
    def answer(prompt: str) -> str:
        user, _ = last_turn(prompt)
        return user.rpartition(".")[0].rpartition("newlines.")[2] if "Transcribe" in user else "Yes."

    wav = recording(tmp_path / "talk.wav", 0.5, LIGHT, PAUSE, THANKS, 0.1)
    config = config_for("mqtt://localhost", transcripts=True)
    with listening(wav, config=config, answer=answer) as (seen, engine, _):
        pass
    assert [turn.text for turn in seen.turns] == [LIGHT.rstrip("."), THANKS.rstrip(".")]
    second = engine.prompts[2]
    assert f"<|turn>user\n{LIGHT.rstrip('.')}<turn|>" in second and f"⟨{LIGHT}⟩" not in second
    assert f"⟨{THANKS}⟩" in second


def test_a_tool_that_is_called_for_ever_is_stopped(tmp_path: Path) -> None:
    class Yes(NoHome):
        calls = 0

        def call(self, name: str, arguments: dict[str, Any]) -> Outcome:
            self.calls += 1
            return Outcome({"status": "ok"}, "ok", True)

    home, seen = Yes(), Seen()
    with hearing_brain(PHRASES, lambda prompt: call("again", times=1)) as (model, _):
        assistant = Assistant(
            config_for("mqtt://localhost", tool_rounds=3), model, home, Speaker(None, None), seen
        )
        assistant.type("Go on.")
        assistant.wait()
    assert home.calls == 4
    assert seen.turns[0].error == "more than 3 rounds of tool calls"


def test_a_failing_engine_is_reported_and_the_next_turn_works() -> None:
    def answer(prompt: str) -> str:
        if "explode" in last_turn(prompt)[0]:
            raise RuntimeError("boom")
        return "Fine."

    seen = Seen()
    with hearing_brain(PHRASES, answer) as (model, engine):
        assistant = Assistant(config_for("mqtt://localhost"), model, NoHome(), Speaker(None, None), seen)
        assistant.type("explode")
        assistant.wait()
        assistant.type("and now?")
        assistant.wait()
    assert seen.turns[0].error and seen.turns[1].answer == "Fine."
    assert "explode" not in engine.prompts[-1]


# --- with real models


def test_a_real_encoder_and_engine(
    tiny_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny random model says nonsense, but all the way: file, detector, encoder, prefill, voice, broker."""
    wav = recording(tmp_path / "talk.wav", 0.4, LIGHT, PAUSE, THANKS, 0.1)
    spoken = tmp_path / "answers.wav"
    home = tmp_path / "home.yaml"
    home.write_text("broker: mqtt://localhost\ntools: []\nanswer: {max_tokens: 24}\nlisten: {longest_s: 6}\n")
    bundle = str(hearing_bundle(tiny_bundle).path)
    arguments = [bundle, "--home", str(home), "--broker", "demo", "--wav", str(wav), "--speed", "8"]
    assert program.main([*arguments, "--speak", str(spoken), "--transcripts"]) == 0
    out = capsys.readouterr().out.splitlines()
    turns = [line for line in out if line.startswith("[")]
    assert len(turns) == 2 and all(" s of speech" in line for line in turns), out
    latencies = [line for line in out if "end of turn to first token" in line]
    assert len(latencies) == 2 and all("prompt " in line for line in latencies), out
    assert spoken.exists()


def test_nano_acts_on_typed_commands(
    nano_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(
        ["Turn on the light in the kitchen.", "Set the bedroom thermostat to 21.", "Lock the front door."]
    )
    monkeypatch.setattr("sys.stdin", lines)
    with mosquitto(tmp_path) as broker, peer(broker.port, "#") as world:
        url = f"mqtt://127.0.0.1:{broker.port}"
        assert program.main([str(nano_bundle), "--text", "--broker", url]) == 0
        sent = [(m.topic, bytes(m.payload)) for m in world.wait(3)]
    assert sent == [
        ("home/kitchen/light/set", b"ON"),
        ("zigbee2mqtt/bedroom_thermostat/set", b'{"system_mode":"heat","occupied_heating_setpoint":21}'),
        ("home/front_door/lock/set", b"LOCK"),
    ]
    out = capsys.readouterr().out
    assert "assistant: The kitchen light is on." in out
    assert "assistant: The bedroom is set to 21 °C." in out
    assert out.count(" reused; done ") == 3, "system message and tools were run before the first turn"


def test_a_deaf_model_says_what_to_do(
    tiny_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wav = recording(tmp_path / "talk.wav", LIGHT)
    deaf = str(tiny_bundle(context=512, chunk=32).path)
    assert program.main([deaf, "--wav", str(wav), "--broker", "demo"]) == 1
    said = capsys.readouterr().err
    assert "hears nothing" in said and "make voice TYPED=1" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["b", "--wav", "x.wav", "--text"], "--wav: leave out"),
        (["b", "--wav", "x.wav", "--say", "Hello"], "--wav: leave out --say"),
        (["b", "--say", "Hello", "--push-to-talk"], "--say: leave out"),
        (["b", "--say", "..."], "expected a sentence"),
        (["b", "--text", "--push-to-talk"], "--text: leave out"),
        (["b", "--wav", "nowhere.wav"], "nowhere.wav: cannot be read"),
        (["b", "--text", "--speed", "-1"], "--speed: expected 0 or more"),
        (["b", "--text", "--threads", "0"], "--threads: expected at least 1"),
        (["b", "--text", "--speak", "loudly"], "--speak loudly: expected auto"),
        (["b", "--text", "--broker", "http://x"], "expected mqtt://"),
        (["nowhere", "--text"], "nowhere"),
        ([], "which model?"),
    ],
)
def test_bad_arguments_are_told(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(arguments) == 1
    assert expected in capsys.readouterr().err


def test_without_a_microphone_it_says_what_else_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, before any model is loaded: `make voice` on a server."""

    class NoCard:
        class PortAudioError(Exception):
            pass

        def query_devices(self, device: object, kind: str) -> None:
            raise self.PortAudioError("Error querying device -1")

    monkeypatch.setattr(microphone, "need_sounddevice", NoCard)
    assert program.main(["no-bundle", "--broker", "demo"]) == 1
    said = capsys.readouterr().err
    assert "no microphone (Error querying device -1)" in said
    assert all(way in said for way in ("--input", "make voice SAY=", "WAV=FILE", "TYPED=1"))


def test_check_reads_the_file_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--check"]) == 0
    assert "4 tools, all well" in capsys.readouterr().out


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    """An interrupted dialogue closes its file and its threads."""
    wav = recording(tmp_path / "talk.wav", 0.5, STORY, 0.1)
    spoken = tmp_path / "answers.wav"
    config = config_for("mqtt://localhost", max_tokens=1000)
    speaker = Speaker(open_voice(config.speak, "espeak"), WavFile(spoken, speed=1.0))
    seen = Seen()
    with hearing_brain(PHRASES, script, step_s=0.01) as (model, engine):
        assistant = Assistant(config, model, NoHome(), speaker, seen)
        listener = VoiceListener(config.listen, assistant.longest_s)
        sound = threading.Thread(
            target=assistant.listen, args=(Recording(wav, 8.0), listener), kwargs=dict(wait=False)
        )
        sound.start()
        seen.wait_for("said This is sentence number 2 of a long story.")
        started = time.monotonic()
        assistant.close()
        assert time.monotonic() - started < 5.0  # the story takes ten
        sound.join(10)
        speaker.close()
    assert seen.turns[0].interrupted and engine.stopped == 1
