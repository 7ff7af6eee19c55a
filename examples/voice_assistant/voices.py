"""Text to sound: piper with a voice of one's own, or espeak-ng as a library or a command. Plays nothing."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import logging
import shutil
import subprocess
import threading
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...runtime.errors import GemmaEdgeError
from .config import Speak

log = logging.getLogger(__name__)

Pcm = npt.NDArray[np.int16]  # (n,) mono
COMMAND_TIMEOUT_S = 20.0
_SYNCHRONOUS, _UTF8, _RATE_PARAMETER = 2, 1, 1  # of speak_lib.h


class VoiceError(GemmaEdgeError):
    """A voice cannot be used."""


class Voice(Protocol):
    """Speaks sentences. One thread at a time uses it."""

    name: str
    rate: int  # Hz

    def say(self, text: str) -> Iterator[Pcm]: ...


def open_voice(settings: Speak, engine: str = "auto") -> Voice:
    """engine: piper, espeak, or auto: piper if a voice is configured and the package is there, else espeak.

    Raises VoiceError.
    """
    has_piper = importlib.util.find_spec("piper") is not None
    if engine == "piper" or (engine == "auto" and settings.piper_voice and has_piper):
        return PiperVoice(settings.piper_voice)
    if engine == "auto" and settings.piper_voice:
        log.warning("piper-tts is not installed (pip install piper-tts): espeak-ng speaks instead")
    if importlib.util.find_spec("espeakng_loader") is not None:
        return EspeakLibrary(settings.espeak_voice, settings.words_per_minute)
    if command := shutil.which("espeak-ng"):
        return EspeakCommand(command, settings.espeak_voice, settings.words_per_minute)
    raise VoiceError(
        "nothing here can speak; pip install 'gemma-edge[voice]', apt install espeak-ng, or use --speak off"
    )


class PiperVoice:
    """A neural voice of piper: a sentence is made whole, then heard."""

    def __init__(self, path: str | None) -> None:
        if path is None:
            raise VoiceError("piper needs a voice; set speak.piper_voice to its .onnx file")
        model = Path(path)
        for file in (model, Path(f"{model}.json")):
            if not file.is_file():
                raise VoiceError(f"speak.piper_voice: {file}: no such file; expected a voice of piper's")
        try:
            from piper import PiperVoice as Model
        except ImportError as cause:
            raise VoiceError(f"piper cannot be used ({cause}); pip install piper-tts") from cause
        try:
            self._model: Any = Model.load(model)
        except Exception as cause:  # of onnxruntime and json, which share no base
            raise VoiceError(f"speak.piper_voice: {model}: not a voice of piper's ({cause})") from cause
        self.name = f"piper {model.stem}"
        self.rate: int = self._model.config.sample_rate

    def say(self, text: str) -> Iterator[Pcm]:
        for chunk in self._model.synthesize(text):
            yield chunk.audio_int16_array


class EspeakCommand:
    """espeak-ng as a program."""

    def __init__(self, command: str, voice: str, words_per_minute: int) -> None:
        self._command = [command, "-v", voice, "-s", str(words_per_minute), "--stdin", "--stdout"]
        self.name = f"espeak-ng {voice}"
        self.rate = 22_050
        self.rate = self._run("a")[1]  # also tells whether it has the voice

    def say(self, text: str) -> Iterator[Pcm]:
        yield self._run(text)[0]

    def _run(self, text: str) -> tuple[Pcm, int]:
        try:
            done = subprocess.run(
                self._command, input=text.encode(), capture_output=True, timeout=COMMAND_TIMEOUT_S, check=True
            )
            with wave.open(io.BytesIO(done.stdout)) as file:
                # Written to a pipe, the header does not know the length; what follows it is samples.
                data = file.readframes(len(done.stdout) // 2)
                return np.frombuffer(data[: len(data) // 2 * 2], "<i2"), file.getframerate()
        except subprocess.CalledProcessError as cause:
            said = cause.stderr.decode(errors="replace").strip()
            raise VoiceError(f"{self.name}: {said or cause}") from cause
        except (OSError, subprocess.SubprocessError, wave.Error, EOFError) as cause:
            raise VoiceError(f"{self.name}: {cause}") from cause


class EspeakLibrary:
    """espeak-ng of the package espeakng-loader, within the process: no program has to be started."""

    _lock = threading.Lock()  # the library has one state for the whole process
    _library: Any = None
    _rate = 0
    _chunks: list[Pcm]
    _callback: Any = None

    def __init__(self, voice: str, words_per_minute: int) -> None:
        self.name = f"espeak-ng {voice}"
        self._voice, self._words_per_minute = voice.encode(), words_per_minute
        with self._lock:
            self._open()
            if self._library.espeak_SetVoiceByName(self._voice) != 0:
                raise VoiceError(f"espeak-ng has no voice {voice!r}; expected one such as en-us or de")
        self.rate = self._rate

    def say(self, text: str) -> Iterator[Pcm]:
        kind = type(self)
        with self._lock:
            kind._chunks = []
            self._library.espeak_SetVoiceByName(self._voice)
            self._library.espeak_SetParameter(_RATE_PARAMETER, self._words_per_minute, 0)
            data = text.replace("\0", " ").encode()
            self._library.espeak_SetSynthCallback(kind._callback)  # others may have set theirs
            self._library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
            self._library.espeak_Synchronize()
            chunks, kind._chunks = kind._chunks, []
        yield from chunks

    @classmethod
    def _open(cls) -> None:
        if cls._library is not None:
            return
        import espeakng_loader

        try:
            library = ctypes.CDLL(espeakng_loader.get_library_path())
        except OSError as cause:
            raise VoiceError(f"espeak-ng cannot be loaded ({cause})") from cause
        # With events of phonemes, which nobody reads here: the library is one for the process, others may.
        cls._rate = library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 1)
        if cls._rate <= 0:
            raise VoiceError("espeak-ng finds no data; reinstall the package espeakng-loader")
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        cls._callback = kind(cls._collect)
        library.espeak_SetSynthCallback(cls._callback)
        cls._library = library

    @classmethod
    def _collect(cls, samples: Any, count: int, events: Any) -> int:
        if count > 0 and samples:
            cls._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0
