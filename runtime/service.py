"""Chat requests in, typed events out: a worker thread owns the engine behind a bounded queue; no transports.

    submit --template, tokenizer--> queue --worker--> engine --ids--> Answer --events--> Job

A request is checked, rendered and tokenized by the thread that submits it, so a bad one is refused at once
and never takes a place in the queue. A full queue answers "busy" at once. A failing request never stops the
worker.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .answer import Answer, ReasoningDelta, TextDelta, ToolCallDelta
from .chat import ChatTemplate
from .errors import RequestError
from .prompt import Part
from .sampler import SamplingParams
from .sounds import Ears, Sound, take_sounds
from .stats import GenerationStats
from .stops import check_stops
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .engine import CancelSignal

__all__ = [
    "ChatRequest",
    "Done",
    "Event",
    "Failed",
    "Job",
    "ReasoningDelta",
    "Service",
    "TextDelta",
    "ToolCallDelta",
    "Usage",
]

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]
MAX_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True)
class ChatRequest:
    """One conversation to answer. messages and tools have OpenAI's shape; sounds: see `take_sounds`."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    enable_thinking: bool = False
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None  # None: what fits in the context
    stop_after: int | None = None  # tokens; unlike max_tokens, more than what fits is not refused
    stop: Sequence[str] = ()
    timeout_s: float | None = None  # from submit to the last token, waiting included; None: no limit


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Done:
    """The last event of an answer. stats: None if the engine never ran."""

    finish_reason: FinishReason
    usage: Usage
    stats: GenerationStats | None


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be answered. code: as in RequestError."""

    code: str
    message: str


Event = TextDelta | ReasoningDelta | ToolCallDelta | Done | Failed


class EngineLike(Protocol):
    """What the service needs of an engine."""

    @property
    def context(self) -> int: ...
    @property
    def eos(self) -> Collection[int]: ...
    @property
    def last_stats(self) -> GenerationStats | None: ...
    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_new_tokens: int,
        cancel: CancelSignal | None = None,
    ) -> Iterator[int]: ...
    def generate_from(
        self,
        parts: Iterable[Part],
        params: SamplingParams,
        *,
        max_new_tokens: int | None,
        cancel: CancelSignal | None = None,
    ) -> Iterator[int]: ...


class Job:
    """A submitted request: its events, and the handle to cancel it. Safe to use from any thread."""

    def __init__(
        self,
        request: ChatRequest,
        prompt_ids: list[int],
        max_new_tokens: int | None,
        sounds: Sequence[Sound] = (),
        stop_after: int | None = None,
    ) -> None:
        self.request = request
        self.prompt_ids = prompt_ids  # with one placeholder for each sound
        self.sounds = sounds
        self.max_new_tokens = max_new_tokens  # None: what fits after a prompt whose length is not known yet
        self.stop_after = stop_after  # the longest answer in that case
        self.deadline = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        self._cancelled = threading.Event()
        self._changed = threading.Condition()
        self._events: list[Event] = []  # bounded: deltas nobody read yet are merged, and an answer ends
        self._started = False
        self.last: Done | Failed | None = None  # the last event, once it was put
        self.first_token_at: float | None = None  # time.perf_counter() when it was there

    def events(self) -> Iterator[Event]:
        """Every event, the last being Done or Failed; blocks. Leaving early cancels the request."""
        last = False
        try:
            while not last:
                with self._changed:
                    while not self._events:
                        if self.closed:
                            return  # somebody read the last event before
                        left = None if self.deadline is None else self.deadline - time.monotonic()
                        if left is not None and left <= 0:
                            self._put_last(Failed("timeout", f"no answer within {self.request.timeout_s} s"))
                        else:
                            self._changed.wait(left)
                    events, self._events = self._events, []
                for event in events:
                    last = isinstance(event, Done | Failed)
                    yield event
        finally:
            self.cancel()  # of no effect once the last event was put

    def cancel(self) -> None:
        """Stop as soon as possible: at once if still waiting. The last event is then Done("cancelled")."""
        self._cancelled.set()
        with self._changed:
            if not self._started:
                self._put_last(Done("cancelled", Usage(len(self.prompt_ids), 0), None))

    def start(self) -> bool:
        """The worker takes the job. False if it is over already."""
        with self._changed:
            self._started = True
            return not self.closed

    def is_set(self) -> bool:
        """Whether the engine should stop: the job is its own cancel signal."""
        return self._cancelled.is_set() or self.expired or self.closed

    @property
    def closed(self) -> bool:
        """Whether the last event was put."""
        return self.last is not None

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def put(self, event: Event) -> None:
        """Add an event; nothing comes after the last one. Text that was not read yet grows instead."""
        with self._changed:
            if isinstance(event, Done | Failed):
                self._put_last(event)
                return
            if self.closed:
                return
            last = self._events[-1] if self._events else None
            if isinstance(last, TextDelta) and isinstance(event, TextDelta):
                self._events[-1] = TextDelta(last.text + event.text)
            elif isinstance(last, ReasoningDelta) and isinstance(event, ReasoningDelta):
                self._events[-1] = ReasoningDelta(last.text + event.text)
            else:
                self._events.append(event)
            self._changed.notify_all()

    def _put_last(self, event: Done | Failed) -> None:
        if self.last is None:
            self.last = event
            self._events.append(event)
            self._changed.notify_all()


class Service:
    """Owns the worker thread. `with Service(…) as service:` drains at the end."""

    def __init__(
        self,
        engine: EngineLike,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        model_name: str,
        queue_size: int = 8,
        max_answer_tokens: int | None = None,
        ears: Ears | None = None,
    ) -> None:
        """max_answer_tokens: the longest answer to a request that names no limit; default: what fits.

        ears: without them a request with sounds is refused.
        """
        self.model_name = model_name
        self._max_answer_tokens = max_answer_tokens
        self._engine = engine
        self._tokenizer = tokenizer
        self._template = template
        self.ears = ears
        self._queue: deque[Job] = deque()  # at most queue_size jobs that are not over
        self._queue_size = queue_size
        self._lock = threading.Condition()  # of everything below and the queue; the worker waits on it
        self._current: Job | None = None
        self._draining = False
        self._counts: Counter[str] = Counter()
        self._started = time.monotonic()
        self._worker = threading.Thread(target=self._work, name="gemma-edge-engine", daemon=True)
        self._worker.start()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.drain(0.0)

    def submit(self, request: ChatRequest) -> Job:
        """Queue a request. Raises RequestError: "busy", "shutting_down", "invalid_request" or
        "context_length_exceeded"."""
        with self._lock:
            self._check_open()  # before the work of tokenizing
        job = self._prepare(request)
        with self._lock:
            self._check_open()
            self._counts["accepted"] += 1
            self._queue.append(job)
            self._lock.notify_all()
        return job

    def drain(self, timeout_s: float) -> bool:
        """Finish what was taken, take no more; cancel what is left after `timeout_s`. True if nothing was."""
        with self._lock:
            self._draining = True
            self._lock.notify_all()
        self._worker.join(timeout_s)
        whole = not self._worker.is_alive()
        if not whole:
            stopping = Failed("shutting_down", "the daemon is stopping")
            with self._lock:
                waiting, current = list(self._queue), self._current
                self._queue.clear()
                self._counts["failed"] += len(waiting)
            for job in waiting:
                job.put(stopping)
            if current is not None:
                current.put(stopping)  # the engine sees that at its next step
            self._worker.join()
        return whole

    def health(self) -> dict[str, Any]:
        """State for people and supervisors, JSON-ready."""
        with self._lock:
            if not self._worker.is_alive():
                state = "stopped"
            elif self._draining:
                state = "draining"
            else:
                state = "ready" if self._current is None else "generating"
            return {
                "state": state,
                "model": self.model_name,
                "context": self._engine.context,
                "queue_length": len(self._queue),
                "queue_size": self._queue_size,
                "uptime_s": round(time.monotonic() - self._started, 3),
                "counts": {name: self._counts[name] for name in _COUNTS},
            }

    def _check_open(self) -> None:
        if self._draining:
            raise RequestError("shutting_down", "the daemon is stopping; try again when it is back")
        for job in [job for job in self._queue if job.closed]:  # cancelled or expired while waiting
            self._queue.remove(job)
            self._count(job.last)
        if len(self._queue) >= self._queue_size:
            self._counts["busy"] += 1
            raise RequestError("busy", f"{len(self._queue)} requests are waiting already; try again later")

    def _prepare(self, request: ChatRequest) -> Job:
        check_stops(request.stop)
        timeout_s = request.timeout_s
        if timeout_s is not None and not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise RequestError(
                "invalid_request", f"timeout_s: expected 0 to {MAX_TIMEOUT_S}, got {timeout_s}"
            )
        messages, sounds = take_sounds(request.messages)
        if sounds and self.ears is None:
            raise RequestError("invalid_request", "this daemon's model hears nothing; send text")
        prompt = self._template.encode(
            self._tokenizer, messages, request.tools, enable_thinking=request.enable_thinking
        )
        if sounds and self.ears is not None and prompt.count(self.ears.tokens.placeholder) != len(sounds):
            raise RequestError("invalid_request", "the model's chat template has no place for these sounds")
        length = len(prompt) + sum(self.ears.check(sound) for sound in sounds if self.ears is not None)
        room = self._engine.context - length
        wanted = request.max_tokens
        caps = [cap for cap in (self._max_answer_tokens, request.stop_after) if cap is not None]
        if wanted is None:
            wanted = min(room, *caps) if caps else room
        if wanted < 1 and request.max_tokens is not None:
            raise RequestError("invalid_request", f"max_tokens: expected at least 1, got {wanted}")
        if room < 1 or wanted > room:
            raise RequestError(
                "context_length_exceeded",
                f"the messages take {length} tokens, {max(wanted, 1)} are asked for, the context holds "
                f"{self._engine.context}; send less, or ask for fewer",
            )
        request = replace(request, messages=messages)  # the sounds' base64 is not kept
        if sounds and request.max_tokens is None:
            # How long a spoken prompt is, is known when it has been heard.
            return Job(request, prompt, None, sounds, min(caps, default=None))
        return Job(request, prompt, wanted, sounds)

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._queue or self._draining)
                if not self._queue:
                    return
                job = self._current = self._queue.popleft()
            try:
                last = self._answer(job)
            except RequestError as error:
                last = Failed(error.code, str(error))
            except Exception:
                log.exception("a request failed")
                last = Failed("internal_error", "the engine failed; the daemon's log has the cause")
            with self._lock:
                self._current = None
                self._count(job.last or last)
            job.put(last)

    def _answer(self, job: Job) -> Done | Failed:
        if not job.start() or job.is_set():
            return _stopped(job, Usage(len(job.prompt_ids), 0), None)
        answer = Answer(self._tokenizer, job.request.stop)
        tokens = self._run(job)
        new_tokens, cut = 0, False
        for token in tokens:
            new_tokens += 1
            if new_tokens == 1:
                job.first_token_at = time.perf_counter()
            for event in answer.push(token):
                job.put(event)
            cut = new_tokens == job.stop_after
            if answer.stopped or cut:
                break
        close: Callable[[], None] | None = getattr(tokens, "close", None)
        if close is not None:
            close()  # a stop string or `stop_after` ends the engine's run early
        stats = self._engine.last_stats
        usage = Usage(stats.prompt_tokens if job.sounds and stats else len(job.prompt_ids), new_tokens)
        ended_early = not answer.stopped and not cut and stats is not None and stats.finish == "cancelled"
        for event in answer.finish():
            job.put(event)
        if ended_early:
            return _stopped(job, usage, stats)
        if answer.calls:
            return Done("tool_calls", usage, stats)
        if not answer.stopped and (cut or (stats is not None and stats.finish == "length")):
            return Done("length", usage, stats)
        return Done("stop", usage, stats)

    def _run(self, job: Job) -> Iterator[int]:
        params, length = job.request.params, job.max_new_tokens
        if not job.sounds:
            assert length is not None
            return self._engine.generate(job.prompt_ids, params, max_new_tokens=length, cancel=job)
        assert self.ears is not None
        parts = self.ears.parts(job.prompt_ids, job.sounds, job)
        return self._engine.generate_from(parts, params, max_new_tokens=length, cancel=job)

    def _count(self, last: Done | Failed | None) -> None:
        if isinstance(last, Failed):
            self._counts["failed"] += 1
        elif last is not None:
            self._counts["cancelled" if last.finish_reason == "cancelled" else "completed"] += 1
            self._counts["prompt_tokens"] += last.usage.prompt_tokens
            self._counts["completion_tokens"] += last.usage.completion_tokens


_COUNTS = ("accepted", "completed", "cancelled", "failed", "busy", "prompt_tokens", "completion_tokens")


def _stopped(job: Job, usage: Usage, stats: GenerationStats | None) -> Done | Failed:
    """The last event of a job that was stopped from outside."""
    if job.expired and not job.cancelled:
        return Failed("timeout", f"not finished within {job.request.timeout_s} s")
    return Done("cancelled", usage, stats)
