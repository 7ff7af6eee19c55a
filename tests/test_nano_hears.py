"""The bundled nano model hears: held-out speech in the int4 bundle, over every protocol, in the assistant."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncClient
from wyoming.error import Error
from wyoming.handle import Handled

from gemma_edge.examples.nano_model.corpus import Encoder
from gemma_edge.examples.nano_model.evaluate import bundle_generate, cases, plain_words, word_errors
from gemma_edge.examples.nano_model.speech import Speaker, say
from gemma_edge.examples.voice_assistant import __main__ as assistant
from gemma_edge.examples.voice_assistant.config import load_config
from gemma_edge.examples.voice_assistant.tools import declaration
from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.chat import load_template
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.sounds import Feed, Sound, open_ears, take_sounds
from gemma_edge.runtime.tokenizer import load_tokenizer
from gemma_edge.runtime.transcribe import transcription

from .support.brokers import Mosquitto, mosquitto
from .support.daemon_process import SERVE, DaemonProcess, daemon_process, request
from .support.hearing import input_audio, wav
from .support.mqtt_peer import body, peer
from .support.sounds import RATE

NANO = Path(__file__).parent.parent / "models" / "nano"
HOME = Path(assistant.__file__).parent / "home.yaml"
TOOLS = [declaration(tool) for tool in load_config(HOME).tools]
SYSTEM = {"role": "system", "content": "You control a home. Call a tool when one fits."}
FORM = dict(rate=RATE, width=2, channels=1)

# A voice and a rate that training never had.
SPEAKER = Speaker("en-us+m3", rate=155, pitch=50, range=50)
SENTENCE = "Heat the bedroom to 21 degrees."
CALL = ("set_temperature", {"room": "bedroom", "celsius": 21})

HELD_OUT = 12  # sentences to write down, and as many spoken commands; the slow test takes 300
MOST_WORD_ERRORS_PERCENT = 12
LEAST_RIGHT_CALLS = 8  # 92 % are right of many


def spoken(text: str) -> np.ndarray:
    """A sentence with a little silence around it: int16, mono, 16 kHz."""
    samples = np.pad(say(text, SPEAKER).samples, RATE // 4)
    return (samples * 0.6 * 32767).astype(np.int16)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return spoken(SENTENCE)


def test_held_out_speech_is_written_down_and_acted_on(nano_bundle: Path) -> None:
    """Sentences, voices, rates and rooms that training never had."""
    encoder = Encoder(NANO)
    wanted = ("transcript", "spoken_command")
    asked = [case for case in cases(encoder, HELD_OUT, spoken=True) if case.task in wanted]
    words = errors = calls = 0
    wrong: list[str] = []
    for case, ids in zip(asked, bundle_generate(nano_bundle)([case.prompt for case in asked]), strict=True):
        kept = [token for token in ids if token not in encoder.stops]
        answer = encoder.tokenizer.decode(kept, skip_special_tokens=False)
        problems = case.judge(answer)
        wrong += problems
        if case.task == "transcript":
            words += len(case.words)
            errors += word_errors(case.words, plain_words(answer))
        else:
            calls += not problems
    assert words > 3 * HELD_OUT
    assert 100 * errors / words <= MOST_WORD_ERRORS_PERCENT, (errors, words, wrong)
    assert calls >= LEAST_RIGHT_CALLS, (calls, wrong)


def test_streamed_hearing_gives_the_same_transcript(nano_bundle: Path, clip: np.ndarray) -> None:
    """The prompt that every protocol makes; sound at once, and in pieces that come one after the other."""
    bundle = open_bundle(nano_bundle)
    ears, engine = open_ears(bundle), Engine(bundle)
    assert ears is not None
    tokenizer, template = load_tokenizer(bundle), load_template(bundle)
    asked = transcription({"type": "audio", "file": wav(clip)}, language="en")
    messages, _ = take_sounds(asked.messages)
    prompt = template.encode(tokenizer, messages, [])

    def transcript(sound: Sound) -> str:
        ids = engine.generate_from(ears.parts(prompt, [sound], threading.Event()), max_new_tokens=40)
        return tokenizer.decode([token for token in ids if token not in engine.eos])

    def pieces(size: int) -> Feed:
        feed = Feed(RATE, max_s=10)
        feed.soft = np.concatenate([*streamed(size)])
        return feed

    def streamed(size: int) -> Iterator[np.ndarray]:
        stream = ears.encoder.stream(RATE)
        for start in range(0, len(clip), size):
            yield stream.push(clip[start : start + size])
        yield stream.finish()

    assert transcript(wav(clip)) == SENTENCE
    assert transcript(pieces(512)) == transcript(pieces(5000)) == SENTENCE


class Running:
    """A daemon with every protocol, and its broker."""

    def __init__(self, daemon: DaemonProcess, broker: Mosquitto, folder: Path) -> None:
        self.socket, self.broker = folder / "http.sock", broker
        ready = daemon.wait_ready()
        self.uris = {
            "unix": f"unix://{folder}/wyoming.sock",
            "tcp": next(word.rstrip(",") for word in ready.split() if word.startswith("tcp://")),
        }


@pytest.fixture(scope="module")
def running(nano_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("nano")
    with mosquitto(folder) as broker:
        command = [*SERVE, str(nano_bundle), "--socket", str(folder / "http.sock")]
        command += ["--mqtt", f"mqtt://127.0.0.1:{broker.port}", "--node", "nano"]
        command += ["--wyoming", f"unix://{folder}/wyoming.sock", "--wyoming", "tcp://127.0.0.1:0"]
        with daemon_process(command, folder / "log") as daemon:
            yield Running(daemon, broker, folder)


def chat(sound: np.ndarray) -> dict[str, Any]:
    """A spoken turn to a home with tools."""
    spoken_turn = {"role": "user", "content": [input_audio(wav(sound))]}
    return {"messages": [SYSTEM, spoken_turn], "tools": TOOLS}


def call_of(answer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls", choice
    [call] = choice["message"]["tool_calls"]
    return call["function"]["name"], json.loads(call["function"]["arguments"])


def test_http_writes_down_and_calls_the_tool(running: Running, clip: np.ndarray) -> None:
    transport = httpx2.HTTPTransport(uds=str(running.socket))
    with openai.OpenAI(
        base_url="http://localhost/v1", api_key="none", http_client=httpx2.Client(transport=transport)
    ) as api:
        model = api.models.list().data[0].id
        heard = api.audio.transcriptions.create(file=("x.wav", wav(clip)), model=model, language="en")
        assert heard.text == SENTENCE
    status, _, answer = request(running.socket, "POST", "/v1/chat/completions", chat(clip))
    assert status == 200 and call_of(answer) == CALL


def test_mqtt_writes_down_and_calls_the_tool(running: Running, clip: np.ndarray) -> None:
    topics = "gemma-edge/nano/response/audio", "gemma-edge/nano/response/chat"
    with peer(running.broker.port, *topics) as client:
        client.send(wav(clip), topic="gemma-edge/nano/request/audio")
        assert body(client.wait(1, timeout_s=30)[0])["text"] == SENTENCE
        client.send(chat(clip), topic="gemma-edge/nano/request/chat")
        assert call_of(body(client.wait(2, timeout_s=30)[1])) == CALL


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_wyoming_hears_and_handles(running: Running, transport: str) -> None:
    """As Home Assistant does it: asr while somebody speaks, then the transcript to `handle`."""

    async def until(client: AsyncClient, kind: type[Transcript] | type[Handled]) -> str:
        while event := await client.read_event():
            assert not Error.is_type(event.type), event
            if kind.is_type(event.type):
                return kind.from_event(event).text or ""
        raise AssertionError(f"no {kind.__name__}")

    async def talk(question: np.ndarray) -> tuple[str, str]:
        async with AsyncClient.from_uri(running.uris[transport], read_timeout=30.0) as client:
            await client.write_event(Transcribe(language="en").event())
            await client.write_event(AudioStart(**FORM).event())
            raw = question.tobytes()
            for start in range(0, len(raw), 2048):
                await client.write_event(AudioChunk(audio=raw[start : start + 2048], **FORM).event())
            await client.write_event(AudioStop().event())
            heard = await until(client, Transcript)
        async with AsyncClient.from_uri(running.uris[transport], read_timeout=30.0) as client:
            await client.write_event(Transcript(heard).event())
            return heard, await until(client, Handled)

    heard, answer = asyncio.run(talk(spoken("Who are you?")))
    assert heard == "Who are you?" and answer.startswith("I am a very small model.")


def test_a_spoken_dialogue_acts_on_the_home(
    nano_bundle: Path, running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    """The assistant as it is: espeak-ng, the detector, the ears, a real broker; and errors are told."""
    turns = (
        "Turn on the light in the kitchen.",
        "Make it 19 degrees in the bedroom.",
        "It is dark in the attic.",
        "Heat the office to 45 degrees.",
        "What is the kitchen temperature?",
        "Lock the front door.",
    )
    url = f"mqtt://127.0.0.1:{running.broker.port}"
    with peer(running.broker.port, "home/+/light/set", "zigbee2mqtt/#", "home/+/lock/set") as world:
        world.send("21.5 °C", topic="home/kitchen/temperature", retain=True)
        arguments = [str(nano_bundle), "--broker", url, "--say", " ".join(turns), "--speed", "6"]
        assert assistant.main([*arguments, "--transcripts"]) == 0
        sent = [(m.topic, bytes(m.payload)) for m in world.wait(3)]
        world.stays_at(3, for_s=0.1)
    assert sent == [
        ("home/kitchen/light/set", b"ON"),
        ("zigbee2mqtt/bedroom_thermostat/set", b'{"system_mode":"heat","occupied_heating_setpoint":19}'),
        ("home/front_door/lock/set", b"LOCK"),
    ]
    out = capsys.readouterr().out
    for turn in turns:
        assert f"heard: {turn}" in out, out
    assert "assistant: The kitchen light is on." in out
    assert "assistant: That failed: room: there is no 'attic'; known: kitchen, living room," in out
    assert "assistant: That failed: celsius: 45 is out of range; at least 5 and at most 28." in out
    assert "assistant: kitchen temperature reads 21.5 °C." in out
