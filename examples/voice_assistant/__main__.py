"""`python -m gemma_edge.examples.voice_assistant BUNDLE`: the assistant, until Ctrl-C or its sound ends."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from ...runtime.errors import ConfigError, GemmaEdgeError
from .assistant import Assistant
from .brain import Brain, open_brain
from .config import Config, load_config
from .console import Console
from .conversation import system_message
from .home import Home
from .keyboard import Keyboard
from .listener import ButtonListener, VoiceListener
from .microphone import Microphone, Recording, find_microphone, need_sounddevice
from .say import PAUSE_S, sentences, write_recording
from .speaker import Loudspeaker, Output, Speaker, WavFile
from .voices import Voice, open_voice

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
BROKER_WAIT_S = 5.0
# What the sensors of home.yaml say in the demo.
DEMO_READINGS = {
    "home/kitchen/temperature": "21.5 °C",
    "home/bedroom/temperature": "18.2 °C",
    "home/tank/level": "64 %",
}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for name in ("amqtt", "transitions", "paho"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        if args.list_devices:
            print(need_sounddevice().query_devices() or "no sound device")
            return 0
        config = settings(args)
        if args.check:
            print(f"{args.home}: {len(config.tools)} tools, all well")
            return 0
        if args.bundle is None:
            raise ConfigError("which model? Give a bundle, made by gemma-edge export")
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stopper(stop))
        with contextlib.suppress(Interrupted):
            run(args, config, stop)
    except GemmaEdgeError as error:
        print(f"voice-assistant: {error}", file=sys.stderr)
        return 1
    return 0


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gemma_edge.examples.voice_assistant",
        description="A voice assistant on one device: it hears, answers aloud and acts over MQTT.",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, nargs="?", help="folder made by `gemma-edge export`")
    add(
        "--home",
        metavar="FILE",
        type=Path,
        default=HERE / "home.yaml",
        help="tools and settings",
    )
    add("--check", action="store_true", help="only check that file")
    add("--broker", metavar="URL", help='instead of the file\'s; "demo": one of its own, with a few readings')
    source = parser.add_argument_group("what it listens to (default: the microphone)")
    source.add_argument("--wav", metavar="FILE", type=Path, help="a recording (WAV, FLAC, OGG, MP3)")
    source.add_argument("--say", metavar="TEXT", help="what espeak-ng says, a turn for each sentence")
    source.add_argument("--speed", type=float, default=1.0, metavar="X", help="X times as fast (0: at once)")
    source.add_argument(
        "--overlap", action="store_true", help="the recording goes on during answers, as a microphone would"
    )
    source.add_argument("--text", action="store_true", help="typed lines only; the model need not hear")
    source.add_argument("--push-to-talk", action="store_true", help="Enter begins and ends a turn")
    source.add_argument("--input", metavar="DEVICE", help="microphone: number or part of its name")
    source.add_argument("--list-devices", action="store_true", help="list microphones and loudspeakers")
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--speak",
        metavar="HOW",
        help="auto, piper, espeak, off, or FILE.wav (default: auto with a microphone, else off)",
    )
    answers.add_argument("--output", metavar="DEVICE", help="loudspeaker: number or part of its name")
    answers.add_argument("--transcripts", action="store_true", help="write down what was heard")
    add("--threads", type=int, metavar="N", help="of the model (default: as its device profile says)")
    add("-v", "--verbose", action="store_true", help="log debug messages")
    return parser


def settings(args: argparse.Namespace) -> Config:
    """The file, and what the command line changes. Raises ConfigError."""
    if args.wav is not None and args.say is not None:
        raise ConfigError("--wav: leave out --say")
    for name in ("wav", "say"):
        if getattr(args, name) is not None and (args.text or args.push_to_talk):
            raise ConfigError(f"--{name}: leave out --text and --push-to-talk")
    if args.text and args.push_to_talk:
        raise ConfigError("--text: leave out --push-to-talk")
    if not args.speed >= 0:
        raise ConfigError(f"--speed: expected 0 or more, got {args.speed:g}")
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"--threads: expected at least 1, got {args.threads}")
    config = load_config(args.home)
    replace = msgspec.structs.replace
    if args.broker is not None and args.broker != "demo":
        config = replace(config, broker=args.broker)
        config.broker_address  # noqa: B018 - asked for its error
    if args.transcripts:
        config = replace(config, answer=replace(config.answer, transcripts=True))
    return config


def run(args: argparse.Namespace, config: Config, stop: threading.Event) -> None:
    """The whole dialogue. Raises GemmaEdgeError, or Interrupted."""
    with contextlib.ExitStack() as stack:
        recording = stack.enter_context(_recording(args, config))
        microphone = None
        if recording is None and not args.text:
            find_microphone(_device(args.input))
            microphone = Microphone(_device(args.input), stop)
        speaker = Speaker(*_voice(args, config))
        stack.callback(speaker.close)
        if args.broker == "demo":
            url = stack.enter_context(_demo_broker())
            config = msgspec.structs.replace(config, broker=url)
        home = stack.enter_context(Home(config))
        head = system_message(config.system)
        brain = stack.enter_context(
            open_brain(
                args.bundle, hears=not args.text, head=head, tools=home.declarations, threads=args.threads
            )
        )
        if not home.wait_online(BROKER_WAIT_S):
            log.warning("%s does not answer yet; calls fail until it does", config.broker_address)
        assistant = Assistant(config, brain, home, speaker, Console())
        stack.callback(assistant.close)
        if recording is not None:
            _ready(brain, speaker, f"{args.wav or 'espeak-ng as the user'}, {recording.duration_s:.1f} s")
            listener = VoiceListener(config.listen, assistant.longest_s)
            assistant.listen(recording, listener, wait=not args.overlap)
        elif microphone is None:
            _ready(brain, speaker, "type a line; Ctrl-D ends")
            keyboard = Keyboard()
            while (line := keyboard.wait_line()) is not None:
                assistant.type(line)
                assistant.wait()
        else:
            _with_microphone(args, config, assistant, stack.enter_context(microphone), brain, speaker, stop)


@contextlib.contextmanager
def _recording(args: argparse.Namespace, config: Config) -> Iterator[Recording | None]:
    """What is played instead of a microphone; None: nothing is."""
    if args.say is None:
        yield Recording(args.wav, args.speed) if args.wav is not None else None
        return
    with tempfile.TemporaryDirectory(prefix="gemma-edge-say-") as folder:
        path = Path(folder) / "talk.wav"
        voice = open_voice(config.speak, "espeak")
        pause_s = max(PAUSE_S, config.listen.hangover_s + 0.5)
        write_recording(path, sentences([args.say]), voice, pause_s=pause_s)
        yield Recording(path, args.speed)


def _with_microphone(
    args: argparse.Namespace,
    config: Config,
    assistant: Assistant,
    microphone: Microphone,
    brain: Brain,
    speaker: Speaker,
    stop: threading.Event,
) -> None:
    keyboard = Keyboard()
    listener: ButtonListener | VoiceListener
    if args.push_to_talk:
        listener = ButtonListener(config.listen, assistant.longest_s, keyboard.is_down)
        _ready(brain, speaker, "Enter begins and ends a turn; a typed line is one, too; Ctrl-C ends")
    else:
        listener = VoiceListener(config.listen, assistant.longest_s)
        _ready(brain, speaker, "speak, or type a line; Ctrl-C ends")

    def typed() -> str | None:
        if args.push_to_talk and keyboard.closed.is_set():
            stop.set()  # there is no button any more
        return keyboard.line()

    barge_in = config.listen.barge_in or args.push_to_talk
    assistant.listen(microphone, listener, typed=typed, barge_in=barge_in)


def _voice(args: argparse.Namespace, config: Config) -> tuple[Voice | None, Output | None]:
    """The voice and where it goes; both None: answers are shown only."""
    is_heard = args.wav is None and args.say is None and not args.text
    how = args.speak or ("auto" if is_heard else "off")
    if how == "off":
        return None, None
    is_file = how.lower().endswith(".wav")
    if not is_file and how not in ("auto", "piper", "espeak"):
        raise ConfigError(f"--speak {how}: expected auto, piper, espeak, off or FILE.wav")
    try:
        voice = open_voice(config.speak, "auto" if is_file else how)
        if is_file:
            return voice, WavFile(Path(how), speed=args.speed if args.overlap else 0.0)
        return voice, Loudspeaker(voice.rate, _device(args.output))
    except GemmaEdgeError as error:
        if args.speak is not None or args.output is not None:
            raise
        log.warning("%s; answers are shown only", error)
        return None, None


def _device(name: str | None) -> str | int | None:
    return int(name) if name is not None and name.isdecimal() else name


def _ready(brain: Brain, speaker: Speaker, how: str) -> None:
    voice = speaker.voice.name if speaker.voice is not None else "no voice"
    print(f"ready: {brain.service.model_name}, {voice}; {how}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _demo_broker() -> Iterator[str]:
    """A broker within this process, with the readings of a small home; its URL."""
    from paho.mqtt import publish

    from ...runtime.transports.mqtt_address import parse_broker_url
    from ..sensor_summary.demo import own_broker

    with own_broker(threading.Event()) as url:
        address = parse_broker_url(url)
        readings: list[Any] = [(topic, text, 1, True) for topic, text in DEMO_READINGS.items()]
        publish.multiple(readings, hostname=address.host, port=address.port)
        yield url


def _stopper(stop: threading.Event) -> Callable[[int, object], None]:
    def handle(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        stop.set()
        raise Interrupted

    return handle


if __name__ == "__main__":
    sys.exit(main())
