"""A real service that hears: a tiny random model and audio encoder. It talks nonsense, always the same."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import soundfile

from gemma_edge.runtime.audio.encoder import AudioEncoder
from gemma_edge.runtime.chat import load_template
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.service import ChatRequest, Service, TextDelta
from gemma_edge.runtime.sounds import Ears
from gemma_edge.runtime.tokenizer import load_tokenizer
from gemma_edge.runtime.transcribe import transcription

from .sounds import RATE, speech
from .tiny_audio import TINY
from .tiny_bundles import TinyBundle

MODEL_NAME = "tiny"
ANSWER_TOKENS = 12


def hearing_bundle(tiny_bundle: Callable[..., Any], **options: Any) -> TinyBundle:
    return tiny_bundle(context=512, chunk=32, model=dict(audio=TINY), **options)


@contextmanager
def hearing_service(tiny: TinyBundle, *, ears: bool = True, **options: Any) -> Iterator[Service]:
    bundle = tiny.bundle
    with Service(
        Engine(bundle),
        load_tokenizer(bundle),
        load_template(bundle),
        model_name=MODEL_NAME,
        max_answer_tokens=ANSWER_TOKENS,
        ears=Ears(AudioEncoder(bundle, threads=1)) if ears else None,
        **options,
    ) as service:
        yield service


def wav(samples: np.ndarray | None = None, rate: int = RATE, subtype: str = "PCM_16") -> bytes:
    """A WAV file; by default of two seconds of speech."""
    file = io.BytesIO()
    soundfile.write(file, clip() if samples is None else samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def clip(seconds: float = 2.0) -> np.ndarray:
    """Speech, mono, 16 kHz, int16: what a microphone gives."""
    return (speech()[: int(seconds * RATE)] * 32767).astype(np.int16)


def input_audio(data: bytes) -> dict[str, Any]:
    """OpenAI's content part."""
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"},
    }


def said(service: Service, request: ChatRequest) -> str:
    """What the service answers when it is asked directly."""
    return "".join(e.text for e in service.submit(request).events() if isinstance(e, TextDelta))


def transcript_of(service: Service, data: bytes, language: str = "en", **more: Any) -> str:
    """The transcript that every protocol must give."""
    request = transcription({"type": "audio", "file": data}, language=language, **more)
    return " ".join(said(service, request).split())
