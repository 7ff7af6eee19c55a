"""Asking a model for a transcript: the instruction and its languages, and the clean text of the answer.

Whatever transcribes (HTTP, MQTT, Wyoming, a model's training and evaluation) takes the instruction from here,
because a model writes down best what it is asked for in the words it was trained with.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from .errors import RequestError
from .sampler import SamplingParams
from .service import ChatRequest

# Google's wording for Gemma. It comes before the sound, so that it is prefilled while somebody speaks.
INSTRUCTION = (
    "Transcribe the following speech segment in {language} into {language} text. "
    "Only output the transcription, with no newlines."
)
MAX_TOKENS = 448  # of a transcript: more than 30 s of the fastest speech
MAX_PROMPT_CHARS = 2_000  # of a hint

LANGUAGES: Mapping[str, str] = {  # ISO 639-1 -> the name in the instruction
    "af": "Afrikaans",
    "ar": "Arabic",
    "be": "Belarusian",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "ca": "Catalan",
    "cs": "Czech",
    "cy": "Welsh",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "eu": "Basque",
    "fa": "Persian",
    "fi": "Finnish",
    "fr": "French",
    "ga": "Irish",
    "gl": "Galician",
    "gu": "Gujarati",
    "he": "Hebrew",
    "hi": "Hindi",
    "hr": "Croatian",
    "hu": "Hungarian",
    "hy": "Armenian",
    "id": "Indonesian",
    "is": "Icelandic",
    "it": "Italian",
    "ja": "Japanese",
    "ka": "Georgian",
    "kk": "Kazakh",
    "kn": "Kannada",
    "ko": "Korean",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "mk": "Macedonian",
    "ml": "Malayalam",
    "mr": "Marathi",
    "ms": "Malay",
    "ne": "Nepali",
    "nl": "Dutch",
    "no": "Norwegian",
    "pa": "Punjabi",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sq": "Albanian",
    "sr": "Serbian",
    "sv": "Swedish",
    "sw": "Swahili",
    "ta": "Tamil",
    "te": "Telugu",
    "th": "Thai",
    "tl": "Tagalog",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "uz": "Uzbek",
    "vi": "Vietnamese",
    "zh": "Chinese",
    "zu": "Zulu",
}
_CODES = {name.lower(): code for code, name in LANGUAGES.items()}


def language_code(given: str) -> str:
    """`en` of `en`, `en-US`, `EN_us` or `English`. Raises RequestError for what has no name here."""
    wanted = given.strip().lower()
    code = _CODES.get(wanted, wanted.replace("_", "-").partition("-")[0])
    if code not in LANGUAGES:
        near = difflib.get_close_matches(wanted[:32], [*LANGUAGES, *_CODES], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RequestError(
            "invalid_request",
            f"language: expected an ISO 639-1 code or an English name, as in 'en', got {given[:32]!r}{hint}",
        )
    return code


def instruction(language: str, prompt: str | None = None) -> str:
    """What the model is told. prompt: words that help, as OpenAI's API has them. Raises RequestError."""
    text = INSTRUCTION.format(language=LANGUAGES[language_code(language)])
    if not prompt or not prompt.strip():
        return text
    if len(prompt) > MAX_PROMPT_CHARS:
        raise RequestError(
            "invalid_request", f"prompt: {len(prompt)} characters, at most {MAX_PROMPT_CHARS} are taken"
        )
    return f"{text}\nContext: {' '.join(prompt.split())}"


def transcription(
    sound: dict[str, Any],
    *,
    language: str,
    prompt: str | None = None,
    temperature: float = 0.0,
    timeout_s: float | None = None,
) -> ChatRequest:
    """The request for a transcript of a sound, given as a content part: see `take_sounds`."""
    content = [{"type": "text", "text": instruction(language, prompt)}, sound]
    return ChatRequest(
        [{"role": "user", "content": content}],
        params=SamplingParams(temperature=temperature),
        stop_after=MAX_TOKENS,
        timeout_s=timeout_s,
    )


class Transcript:
    """A transcript as it grows: one line, single spaces, nothing around it."""

    def __init__(self) -> None:
        self.text = ""
        self._space = False  # white space came that is written once something follows

    def add(self, text: str) -> str:
        """What `text` adds to the transcript, maybe nothing."""
        if not text:
            return ""
        words = text.split()
        if not words:
            self._space = True
            return ""
        space = " " if self.text and (self._space or text[0].isspace()) else ""
        new = space + " ".join(words)
        self._space = text[-1].isspace()
        self.text += new
        return new
