"""The same bundle on onnxruntime-genai: what `Engine` does, without prefix cache, guesses and early prefill.

A prompt runs when it is there whole: genai sizes its caches before the first token. Sounds come as soft
tokens, made by the bundle's encoder while they arrive. Knows genai's calls and options, no text.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import genai_files
from .bundle import Bundle
from .denormals import denormals_as_zero
from .errors import BundleError, ConfigError, RequestError
from .generation import CancelSignal, Generations, Tally
from .machine import usable_cpus
from .prompt import Now, Part, Soft, check_wanted
from .sampler import SamplingParams

PACKAGE = "onnxruntime-genai"
SUPPORTED = "0.18"
SLIDING = "sliding_attention"
MOST_SEED = 2**31 - 1  # genai's seeds are below
PROVIDERS: dict[str, list[dict[str, Any]]] = {"cpu": [], "cuda": [{"cuda": {}}]}


class GenaiEngine(Generations):
    """One model on onnxruntime-genai."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, hears: bool = False) -> None:
        """Load the bundle.

        threads: as for `Engine`. hears: whether prompts may hold soft tokens; other graphs are loaded then.
        Raises ConfigError if genai is not there, BundleError if it cannot load the bundle.
        """
        manifest = bundle.manifest
        super().__init__(manifest)
        # genai makes no cache longer than a generation, but a sliding one must hold its window.
        sliding = [cache.capacity for cache in manifest.caches.layers if cache.layer_type == SLIDING]
        self._least_length = max(sliding, default=0)
        self._chunk = min(manifest.runtime.prefill_chunk, self.context)
        if hears and manifest.audio is None:
            raise BundleError(f"{bundle.path}: the model does not hear; open it without sounds")
        self._placeholder = manifest.audio.tokens.placeholder if hears and manifest.audio else None
        self.threads = threads or min(manifest.runtime.threads, usable_cpus())
        self._genai = _genai()
        self._model = self._load(bundle)

    def generate_from(
        self,
        parts: Iterable[Part],
        params: SamplingParams | None = None,
        *,
        max_new_tokens: int | None = None,
        cancel: CancelSignal | None = None,
    ) -> Iterator[int]:
        """As `generate`, for a prompt in parts. What the iterator of `parts` raises passes through."""
        options = search_options(params or SamplingParams(), self._vocab_size)
        check_wanted(max_new_tokens)
        self._generation += 1
        return self._run(parts, options, max_new_tokens, cancel, self._generation)

    def remember(self, prompt_ids: Sequence[int], name: str) -> None:
        """Refused: there is no prefix cache here."""
        raise RequestError("invalid_request", f"{name}: {PACKAGE} has no prefix cache to keep it in")

    def close(self) -> None:
        """Nothing is kept on disk."""

    @denormals_as_zero()
    def _load(self, bundle: Bundle) -> Any:
        overlay = _overlay(bundle, self.threads, hears=self._placeholder is not None)
        if bundle.manifest.runtime.execution_provider == "cuda" and not self._genai.is_cuda_available():
            raise BundleError(
                f"{bundle.path}: made for CUDA, this {PACKAGE} has none; install onnxruntime-genai-cuda "
                "or export for another device"
            )
        try:
            config = self._genai.Config(str(bundle.path))
            config.overlay(json.dumps(overlay))
            return self._genai.Model(config)
        except Exception as cause:  # genai raises RuntimeError and classes of its own
            raise BundleError(
                f"{bundle.path}: {PACKAGE} {self._genai.__version__} cannot load it ({cause}); export "
                "it again, or leave out --engine genai"
            ) from cause

    def _run(
        self,
        parts: Iterable[Part],
        options: dict[str, Any],
        max_new_tokens: int | None,
        cancel: CancelSignal | None,
        generation: int,
    ) -> Iterator[int]:
        tally, start = Tally(), time.perf_counter()
        try:
            prompt = self._whole(parts, max_new_tokens)
            tally.complete_s = time.perf_counter() - start
            tally.prompt_tokens = len(prompt.ids)
            wanted = self._check_room(len(prompt.ids), max_new_tokens)
            self._check_current(generation)
            if cancel is not None and cancel.is_set():
                return
            generator = self._generator(options, len(prompt.ids) + wanted)
            for _ in self._prefill(generator, prompt):
                if cancel is not None and cancel.is_set():
                    return
            tally.prefill_s = time.perf_counter() - start - tally.complete_s
            while True:
                before = time.perf_counter()
                with denormals_as_zero():
                    generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                now = time.perf_counter()
                if not tally.ttft_s:
                    tally.ttft_s = now - start
                else:
                    tally.decode_s += now - before
                    tally.decode_steps += 1
                if (yield from self._give(token, tally, wanted, cancel, generation)):
                    return
        finally:
            if generation == self._generation:
                self.last_stats = tally.stats()

    def _whole(self, parts: Iterable[Part], max_new_tokens: int | None) -> _Prompt:
        prompt = _Prompt()
        for part in parts:
            if isinstance(part, Now):
                continue
            if isinstance(part, Soft):
                if self._placeholder is None:
                    raise ValueError("soft tokens for an engine that was opened without `hears`")
                if part.rows.ndim != 2 or part.rows.shape[1] != self._hidden_size:
                    raise ValueError(
                        f"soft tokens have shape {part.rows.shape}, expected (tokens, {self._hidden_size})"
                    )
                prompt.ids += [self._placeholder] * len(part.rows)
                prompt.soft.append(part.rows)
                prompt.heard = len(prompt.ids)
            elif part:
                prompt.ids += self._check_ids(part).tolist()
            self._check_room(len(prompt.ids), max_new_tokens)
        if not prompt.ids:
            raise RequestError("invalid_request", "the prompt is empty; give at least one token")
        return prompt

    def _generator(self, options: dict[str, Any], length: int) -> Any:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=max(length, self._least_length), **options)
        return self._genai.Generator(self._model, params)

    def _prefill(self, generator: Any, prompt: _Prompt) -> Iterator[None]:
        """Run the prompt, pausing between chunks. genai takes all that was heard in its first one."""
        ids = np.asarray(prompt.ids, np.int32)
        done = 0
        if self._placeholder is not None:
            done = max(prompt.heard, min(self._chunk, len(ids)))
            inputs = self._genai.NamedTensors()
            inputs["input_ids"] = ids[None, :done]
            if prompt.soft:
                rows = np.concatenate(prompt.soft).astype(np.float32)
                inputs["input_features"] = rows[None]
                inputs["audio_sizes"] = np.array([len(rows)], np.int64)
            with denormals_as_zero():
                generator.set_inputs(inputs)
            yield
        for first in range(done, len(ids), self._chunk):
            with denormals_as_zero():
                generator.append_tokens(ids[first : first + self._chunk])
            yield

    def _check_ids(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        found = super()._check_ids(ids)
        if self._placeholder is not None and (found == self._placeholder).any():
            raise RequestError(
                "invalid_request",
                f"token {self._placeholder} stands for a sound, which has to come as soft tokens",
            )
        return found


def search_options(params: SamplingParams, vocab_size: int) -> dict[str, Any]:
    """genai's names of what a request asks for. A seed repeats an answer, but not one of `Engine`'s.

    Raises RequestError for what genai cannot do.
    """
    if params.min_p > 0 and params.temperature > 0:
        raise RequestError("invalid_request", f"min_p: {PACKAGE} cannot do it; use top_p, or leave it out")
    options: dict[str, Any] = dict(repetition_penalty=float(params.repetition_penalty), do_sample=False)
    if params.temperature > 0:
        options |= dict(
            do_sample=True,
            temperature=float(params.temperature),
            # With 0 genai 0.18 looks at top_p no more.
            top_k=min(params.top_k or vocab_size, vocab_size),
            top_p=float(params.top_p),
        )
        if params.seed is not None:
            options["random_seed"] = params.seed % MOST_SEED
    return options


def _overlay(bundle: Bundle, threads: int, *, hears: bool) -> dict[str, Any]:
    """What differs from the bundle's genai_config.json: provider and threads, and for sounds the graphs."""
    overlay: dict[str, Any] = {"model": {"decoder": {}}}
    if hears:
        overlay = _read_overlay(bundle.path / genai_files.AUDIO_OVERLAY)
        overlay["model"]["speech"]["filename"] = genai_files.SOFT_TOKENS
        # Most of a prompt that hears is run in one call: in chunks inside, for the memory's sake.
        overlay["search"] = {"chunk_size": bundle.manifest.runtime.prefill_chunk}
    overlay["model"]["decoder"]["session_options"] = {
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
        "enable_mem_pattern": False,
        "session.intra_op.spin_duration_us": "50",
        "session.set_denormal_as_zero": "1",
        "provider_options": PROVIDERS[bundle.manifest.runtime.execution_provider],
    }
    return overlay


def _read_overlay(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise BundleError(
            f"{path}: cannot be read ({cause}); this bundle is of a version whose sounds {PACKAGE} cannot "
            "hear: export it again"
        ) from cause
    assert isinstance(found, dict)
    return found


def _genai() -> Any:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise ConfigError(
            f"--engine genai: {PACKAGE} is not installed; pip install 'gemma-edge[genai]', "
            "or leave the option out"
        )
    import onnxruntime_genai

    if not onnxruntime_genai.__version__.startswith(f"{SUPPORTED}."):
        raise ConfigError(
            f"--engine genai: {PACKAGE} is {onnxruntime_genai.__version__}, expected {SUPPORTED}; "
            "pip install 'gemma-edge[genai]'"
        )
    return onnxruntime_genai


@dataclass
class _Prompt:
    """Everything of a prompt; ids have placeholders where soft tokens stand."""

    ids: list[int] = field(default_factory=list)
    soft: list[npt.NDArray[np.float32]] = field(default_factory=list)
    heard: int = 0  # tokens up to the last soft one
