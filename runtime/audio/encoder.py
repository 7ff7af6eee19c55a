"""Sound to soft tokens on onnxruntime: a whole clip, or a stream that encodes while the sound arrives.

    samples -> mono at the model's rate -> log-mel -> audio_encoder_stream.onnx (+ state) -> soft tokens

Both use the streaming graph: a whole clip is a stream pushed at once, so one copy of the weights is in memory
and a clip's length does not matter to it. A soft token is a row that goes in place of a placeholder token's
embedding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..denormals import denormals_as_zero
from ..errors import AudioError, BundleError
from ..graphs import open_graph
from ..machine import usable_cpus
from .files import check_duration, open_audio
from .mel import LogMel
from .samples import MonoStream

SoftTokens = npt.NDArray[np.float32]  # (tokens, hidden)

LIMIT_SLACK_S = 0.1  # the last soft token of a clip need not be whole

_STATE_TYPES = {"float32": np.float32, "int64": np.int64}


class AudioEncoder:
    """A bundle's audio encoder. Streams are independent of each other; one thread at a time uses a stream."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        if bundle.manifest.audio is None:
            raise BundleError(
                f"{bundle.path}: has no audio encoder; export a model that has one, without --no-audio"
            )
        self.audio = bundle.manifest.audio
        self.threads = threads or min(bundle.manifest.runtime.threads, usable_cpus())
        self.log_mel = LogMel(self.audio.mel)
        self.graph = open_graph(bundle.audio_encoder_stream, self.threads, "cpu")
        self.outputs = ["soft_tokens", *(f"present.{tensor.name}" for tensor in self.audio.state)]
        have = {value.name for value in (*self.graph.get_inputs(), *self.graph.get_outputs())}
        need = {"input_features", *self.outputs, *(f"past.{tensor.name}" for tensor in self.audio.state)}
        if have != need:
            differing = ", ".join(sorted(have ^ need)[:4])
            raise BundleError(
                f"{bundle.audio_encoder_stream}: its state is not the manifest's ({differing}); "
                "export it again"
            )

    @property
    def hidden_size(self) -> int:
        return self.audio.hidden_size

    @property
    def max_s(self) -> float:
        """Seconds of sound in a clip at most: what the checkpoint was made for."""
        return self.audio.max_tokens / self.audio.tokens_per_s

    def encode(self, samples: npt.ArrayLike, rate: int) -> SoftTokens:
        """A clip (samples,) or (samples, channels) -> (tokens, hidden). Too short a clip has no token.

        Raises AudioError for what is no sound, or more than `max_s` of it.
        """
        given = np.asarray(samples)
        channels = given.shape[1] if given.ndim == 2 else 1
        stream = self.stream(rate, channels, chunk_tokens=self.audio.call_tokens)
        return np.concatenate([stream.push(given), stream.finish()])

    def encode_file(self, source: Path | bytes, *, name: str = "the sound") -> SoftTokens:
        """A sound file, or the bytes of one (called `name` in messages). Raises AudioError."""
        with open_audio(source, name=name) as file:
            check_duration(file.name, file.duration_s, self.max_s)
            stream = self.stream(file.rate, file.channels, chunk_tokens=self.audio.call_tokens)
            parts = [stream.push(block) for block in file.blocks()]
            return np.concatenate([*parts, stream.finish()])

    def stream(
        self, rate: int, channels: int = 1, *, chunk_tokens: int | None = None, max_tokens: int | None = None
    ) -> AudioStream:
        """A clip whose sound is still to come.

        chunk_tokens: soft tokens encoded together (default: the bundle's): fewer come sooner and cost more.
        max_tokens: of the clip (default: the checkpoint's); the state is as big for any number.
        """
        chunk = self.audio.chunk_tokens if chunk_tokens is None else chunk_tokens
        if not 1 <= chunk <= self.audio.call_tokens:
            raise ValueError(f"chunk_tokens is {chunk}, expected 1 to {self.audio.call_tokens}")
        mono = MonoStream(rate=rate, channels=channels, to_rate=self.audio.mel.sampling_rate)
        limit = self.audio.max_tokens if max_tokens is None else max_tokens
        return AudioStream(self, mono, rate, chunk, limit)


class AudioStream:
    """One clip: `push` samples as they come, then `finish`. Made by `AudioEncoder.stream`."""

    def __init__(
        self, encoder: AudioEncoder, mono: MonoStream, rate: int, chunk_tokens: int, max_tokens: int
    ) -> None:
        self._encoder = encoder
        self._rate = rate
        self._mono = mono
        self._mel = encoder.log_mel.stream()
        self._per_token = encoder.audio.frames_per_token
        self._chunk = chunk_tokens * self._per_token  # frames
        self._max_tokens = max_tokens
        self._frames = np.zeros((0, encoder.audio.mel.bins), np.float32)  # not encoded yet
        self._state = {
            f"past.{tensor.name}": np.zeros(tensor.shape, _STATE_TYPES[tensor.dtype])
            for tensor in encoder.audio.state
        }
        self._ended = False
        self._pushed_s = 0.0
        self.tokens = 0  # encoded so far

    def push(self, samples: npt.ArrayLike) -> SoftTokens:
        """Samples (n,) or (n, channels), any number -> the new soft tokens, (tokens, hidden), often none.

        Raises AudioError; the stream has then ended.
        """
        self._check_open()
        self._ended = True  # unless all goes well
        given = np.asarray(samples)
        self._pushed_s += given.shape[0] / self._rate if given.ndim else 0.0
        if self._pushed_s > self._limit_s + LIMIT_SLACK_S:  # before anything is made of it
            raise self._too_long()
        tokens = self._take(self._mono.push(given))
        self._ended = False
        return tokens

    def finish(self) -> SoftTokens:
        """The clip's last soft tokens."""
        self._check_open()
        self._ended = True
        return np.concatenate([self._take(self._mono.finish()), self._encode_waiting(least=1)])

    @property
    def _limit_s(self) -> float:
        return self._max_tokens / self._encoder.audio.tokens_per_s

    def _too_long(self) -> AudioError:
        return AudioError(f"more than {self._limit_s:g} s of sound in one clip; cut it into shorter ones")

    def _check_open(self) -> None:
        if self._ended:
            raise AudioError("this stream of sound has ended; begin a new one")

    def _take(self, mono: npt.NDArray[np.float32]) -> SoftTokens:
        self._frames = np.concatenate([self._frames, self._mel.push(mono)])
        known = self.tokens + -(-len(self._frames) // self._per_token)
        if known > self._max_tokens:
            raise self._too_long()
        # Only whole groups of frames: a token that lacks some would be another with them.
        return self._encode_waiting(least=self._chunk, whole=self._per_token)

    def _encode_waiting(self, *, least: int, whole: int = 1) -> SoftTokens:
        """Encode waiting frames, `whole` or a multiple at a time, while there are `least`."""
        parts = [np.zeros((0, self._encoder.hidden_size), np.float32)]
        most = self._encoder.audio.call_tokens * self._per_token
        while len(self._frames) >= least:
            count = min(len(self._frames) // whole * whole, most)
            parts.append(self._encode(self._frames[:count]))
            self._frames = self._frames[count:]
        self._frames = self._frames.copy()  # not a view of what has been encoded
        return np.concatenate(parts)

    @denormals_as_zero()
    def _encode(self, frames: npt.NDArray[np.float32]) -> SoftTokens:
        encoder = self._encoder
        soft_tokens, *state = encoder.graph.run(
            encoder.outputs, {"input_features": frames[None], **self._state}
        )
        self._state = dict(zip(self._state, state, strict=True))
        self.tokens += soft_tokens.shape[1]
        return soft_tokens[0]
