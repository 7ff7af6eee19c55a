"""The dialogue: turns in, answers spoken, tools called; a new turn stops an answer that is still running.

    listener --Started--> submit (heard and prefilled while it is spoken) --Ended--> answer thread
    answer thread: events --sentences--> speech        tool calls --> home --results--> next request

The thread that runs `listen` never waits for the model, except for the moment that a cancelled answer needs
to stop. An utterance that got no answer because its speaker went on is put before the next one.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from ...runtime.errors import ConfigError, RequestError
from ...runtime.sampler import SamplingParams
from ...runtime.service import ChatRequest, Done, Failed, Job, TextDelta, ToolCallDelta
from ...runtime.sounds import Feed
from ...runtime.transcribe import transcription
from .brain import Brain, Message
from .config import Config
from .conversation import Conversation, Exchange
from .home import Outcome
from .listener import RATE, Dropped, Ended, ListenEvent, Samples, Started, Voice
from .sentences import Sentences
from .speaker import Speaker, Speech
from .turn import Call, Report, Turn, Utterance

log = logging.getLogger(__name__)

CALL_TOKENS = 96  # kept free for a call and its result
LEAST_S = 2.0  # of speech that must fit into the context
LEAST_WORDS = 64  # tokens of a typed turn that must


class House(Protocol):
    """Where calls go."""

    declarations: list[dict[str, Any]]

    def call(self, name: str, arguments: dict[str, Any]) -> Outcome: ...


class Listening(Protocol):
    """What makes turns of sound: see `listener`."""

    busy: bool

    def push(self, block: Samples) -> Iterable[ListenEvent]: ...
    def finish(self) -> Iterable[ListenEvent]: ...
    def reset(self) -> None: ...


class Assistant:
    """One dialogue. `close` ends what is running."""

    def __init__(self, config: Config, brain: Brain, home: House, speaker: Speaker, report: Report) -> None:
        """Raises ConfigError if the tools leave too little of the context."""
        self._config, self._brain, self._home = config, brain, home
        self._speaker, self._report = speaker, report
        answer = config.answer
        self._params = SamplingParams(temperature=answer.temperature)
        self.conversation = Conversation(config.system, home.declarations, brain.count, answer.remember_turns)
        self.longest_s = self._longest_s()
        self._number = 0
        self._turn: Turn | None = None  # being spoken
        self._running: _Answering | None = None
        self._unanswered: list[Utterance] = []  # their speaker went on

    def listen(
        self,
        blocks: Iterable[Samples],
        listener: Listening,
        *,
        typed: Callable[[], str | None] = lambda: None,
        barge_in: bool = True,
        wait: bool = False,
    ) -> None:
        """Until the sound ends.

        typed: a typed turn, if there is one. barge_in: listen while answering.
        wait: the sound pauses while a turn is answered, as a recording can.
        """
        was_deaf = False
        for block in blocks:
            if (text := typed()) is not None:
                self.type(text)
            busy = self.is_busy
            if busy and not barge_in:
                was_deaf = True
                continue
            if was_deaf:
                was_deaf = False
                listener.reset()
            listener.busy = busy
            self._take(listener.push(block), wait)
        self._take(listener.finish(), wait)
        self.wait()

    def type(self, text: str) -> None:
        """A typed turn; its answer begins at once."""
        self._interrupt()
        turn = self._new_turn()
        turn.text = text
        turn.ended_at = time.perf_counter()
        self._unanswered = []
        self._report.heard(turn)
        self._begin(turn)

    def wait(self) -> None:
        """Until the answer is complete and spoken."""
        if self._running is not None:
            self._running.thread.join()

    def close(self) -> None:
        if self._turn is not None:
            self._drop()
        self._interrupt()

    @property
    def is_busy(self) -> bool:
        return self._running is not None and self._running.thread.is_alive()

    # --- turns: the listening thread

    def _take(self, events: Iterable[ListenEvent], wait: bool) -> None:
        for event in events:
            if isinstance(event, Started):
                self._start(event.samples)
            elif isinstance(event, Voice) and self._turn is not None and self._turn.spoken is not None:
                self._turn.spoken.put(event.samples)
            elif isinstance(event, Ended) and self._turn is not None:
                self._end(self._turn, event)
                if wait:
                    self.wait()
            elif isinstance(event, Dropped) and self._turn is not None:
                self._drop()

    def _start(self, samples: Samples) -> None:
        self._interrupt()
        turn = self._new_turn()
        turn.spoken = Utterance(Feed(RATE, max_s=self.longest_s + 1.0))
        turn.spoken.put(samples)
        self._turn = turn if self._begin(turn) else None

    def _end(self, turn: Turn, event: Ended) -> None:
        assert turn.spoken is not None and self._running is not None
        self._turn, self._unanswered = None, []
        turn.speech_s = event.speech_s
        turn.spoken.feed.end()
        turn.ended_at = turn.spoken.feed.ended_at or time.perf_counter()
        self._report.heard(turn)
        self._running.thread.start()

    def _drop(self) -> None:
        """It was no speech: its request is forgotten, what waits for the next one is kept."""
        assert self._running is not None
        self._turn = None
        self._running.job.cancel()
        self._running = None

    def _new_turn(self) -> Turn:
        self._number += 1
        return Turn(self._number, before=[one.again() for one in self._unanswered])

    def _begin(self, turn: Turn) -> bool:
        """Submit; a typed turn's answer starts, a spoken one's when it has ended. False: it is refused."""
        limit = self._brain.context - self._config.answer.max_tokens - CALL_TOKENS
        if turn.spoken is not None:
            limit -= self._tokens(self.longest_s)
        before_tokens = self._tokens(sum(one.seconds for one in turn.before))
        messages = self.conversation.fit(Exchange(turn.parts()), limit - before_tokens)
        if messages is None and turn.before:
            log.warning("what was said before is too long to be remembered")
            turn.before = []
            messages = self.conversation.fit(Exchange(turn.parts()), limit)
        try:
            if messages is None:
                raise RequestError("context_length_exceeded", "that is too long for the model's context")
            job = self._submit(messages)
        except RequestError as error:
            turn.error = str(error)
            turn.done_at = time.perf_counter()
            self._report.finished(turn)
            return False
        self._running = _Answering(turn, Exchange(turn.parts()), job)
        self._running.thread = threading.Thread(
            target=self._answer, args=(self._running,), name="answer", daemon=True
        )
        if turn.spoken is None:
            self._running.thread.start()
        return True

    def _interrupt(self) -> None:
        """Stop the answer that is running, if there is one, and wait until it has."""
        running, self._running = self._running, None
        if running is None:
            return
        if running.thread.is_alive():
            running.stop()
            running.thread.join()
        turn = running.turn
        if turn.interrupted and turn.spoken is not None and not turn.said and not turn.calls:
            said = [*turn.before, turn.spoken]
            fits = sum(one.seconds for one in said) <= self.longest_s
            self._unanswered = said if fits else said[-1:]

    def _tokens(self, seconds: float) -> int:
        return int(seconds * self._brain.tokens_per_s) + 1 if seconds else 0

    def _longest_s(self) -> float:
        """The longest turn, given the context."""
        sound = {"type": "audio", "feed": Feed(RATE)}
        start = Exchange([sound if self._brain.hears else {"type": "text", "text": ""}])
        taken = self._brain.count([*self.conversation.head, *start.messages()], self._home.declarations)
        room = self._brain.context - taken - self._config.answer.max_tokens - CALL_TOKENS - 1
        least = LEAST_S * self._brain.tokens_per_s if self._brain.hears else LEAST_WORDS
        if room < least:
            raise ConfigError(
                f"the context holds {self._brain.context} tokens: the system message and the tools take "
                f"{taken}, an answer {self._config.answer.max_tokens}; {max(room, 0)} are left, at least "
                f"{least:.0f} are needed. Declare fewer tools, lower answer.max_tokens, or export with a "
                "larger --context"
            )
        if not self._brain.hears:
            return self._config.listen.longest_s
        # A little less than what the encoder takes: the resampler and the last block may add to it.
        return min(self._config.listen.longest_s, self._brain.max_s - 0.2, room / self._brain.tokens_per_s)

    # --- answers: a thread for each turn

    def _answer(self, running: _Answering) -> None:
        turn = running.turn
        speech = running.speech = self._speaker.begin()
        if running.cancelled.is_set():
            speech.stop()
        try:
            self._rounds(running, speech)
            speech.finish()
        except RequestError as error:
            turn.error = str(error)
            speech.stop()
        except Exception:
            log.exception("a turn failed")
            turn.error = "an error inside the assistant; its log has the cause"
            speech.stop()
        turn.first_sound_at = speech.first_sound_at
        turn.interrupted = running.cancelled.is_set()
        turn.said = " ".join(speech.said) if turn.interrupted else turn.answer
        turn.done_at = time.perf_counter()
        self._remember(running)
        if self._config.answer.transcripts and turn.spoken is not None and not turn.interrupted:
            self._write_down(running)
        self._report.finished(turn)

    def _rounds(self, running: _Answering, speech: Speech) -> None:
        """Answers and tool calls, until an answer calls nothing. Raises RequestError."""
        turn, replies = running.turn, running.exchange.replies
        for left in range(self._config.answer.tool_rounds, -1, -1):
            text, called = self._read(running, speech)
            if not called or running.cancelled.is_set():
                if text:
                    replies.append({"role": "assistant", "content": text})
                return
            tool_calls = [_as_call(event) for event in called]
            replies.append({"role": "assistant", "content": text, "tool_calls": tool_calls})
            for event in called:
                call = self._call(event)
                turn.calls.append(call)
                replies.append(_as_result(event, call.outcome))
                self._report.called(turn, call)
            if not left:
                raise RequestError(
                    "invalid_request", f"more than {self._config.answer.tool_rounds} rounds of tool calls"
                )
            limit = self._brain.context - self._config.answer.max_tokens
            messages = self.conversation.fit(running.exchange, limit)
            if messages is None:
                raise RequestError("context_length_exceeded", "the tools' results are too long")
            running.go_on(self._submit(messages))

    def _read(self, running: _Answering, speech: Speech) -> tuple[str, list[ToolCallDelta]]:
        """One request's text and calls; its sentences are spoken as they come. Raises RequestError."""
        turn, job, sentences = running.turn, running.job, Sentences()
        text, called = "", []

        def say(new: Sequence[str]) -> None:
            for sentence in new:
                if not running.cancelled.is_set():
                    turn.answer = f"{turn.answer} {sentence}".strip()
                    self._report.sentence(turn, sentence)
                    speech.say(sentence)

        for event in job.events():
            if turn.first_token_at is None:
                turn.first_token_at = job.first_token_at
            if isinstance(event, TextDelta):
                text += event.text
                say(sentences.push(event.text))
            elif isinstance(event, ToolCallDelta):
                called.append(event)
            elif isinstance(event, Failed):
                raise RequestError(event.code, event.message)
            elif isinstance(event, Done):
                turn.is_cut = event.finish_reason == "length"
                if event.stats is not None and not turn.prompt_tokens:
                    turn.prompt_tokens = event.stats.prompt_tokens
                    turn.reused_tokens = event.stats.reused_tokens
        say(sentences.finish())
        return text.strip(), called

    def _call(self, event: ToolCallDelta) -> Call:
        arguments = json.loads(event.arguments_json)
        return Call(event.name, arguments, self._home.call(event.name, arguments))

    def _remember(self, running: _Answering) -> None:
        turn, exchange = running.turn, running.exchange
        if turn.error is not None:
            return  # the next turn starts where this one did
        if turn.interrupted:
            if not turn.said and not turn.calls:
                return
            if exchange.replies and exchange.replies[-1]["role"] == "assistant":
                exchange.replies.pop()  # replaced by what was heard of it
            exchange.replies.append({"role": "assistant", "content": f"{turn.said} …".strip()})
        elif not exchange.replies:
            return
        self.conversation.remember(exchange)

    def _write_down(self, running: _Answering) -> None:
        """Ask for a transcript, and remember it instead of the sound: it takes a sixth of the tokens."""
        turn = running.turn
        assert turn.spoken is not None
        sound = {"type": "audio", "feed": turn.spoken.feed}
        try:
            request = transcription(sound, language=self._config.answer.language)
            running.go_on(self._brain.service.submit(request))
            text = ""
            for event in running.job.events():
                text += event.text if isinstance(event, TextDelta) else ""
                if isinstance(event, Failed):
                    raise RequestError(event.code, event.message)
        except RequestError as error:
            log.warning("no transcript: %s", error)
            return
        text = " ".join(text.split())
        if text and not running.cancelled.is_set():
            turn.text = text
            running.exchange.parts = [*turn.parts()[:-1], {"type": "text", "text": text}]

    def _submit(self, messages: list[Message]) -> Job:
        return self._brain.service.submit(
            ChatRequest(
                messages,
                self._home.declarations,
                params=self._params,
                stop_after=self._config.answer.max_tokens,
            )
        )


class _Answering:
    """A turn that is being answered: what must be stopped to stop it."""

    def __init__(self, turn: Turn, exchange: Exchange, job: Job) -> None:
        self.turn, self.exchange, self.job = turn, exchange, job
        self.speech: Speech | None = None
        self.cancelled = threading.Event()
        self.thread: threading.Thread = threading.Thread()

    def go_on(self, job: Job) -> None:
        self.job = job
        if self.cancelled.is_set():
            job.cancel()

    def stop(self) -> None:
        self.cancelled.set()
        self.job.cancel()
        if self.speech is not None:
            self.speech.stop()


def _as_call(event: ToolCallDelta) -> dict[str, Any]:
    function = {"name": event.name, "arguments": event.arguments_json}
    return {"id": event.id, "type": "function", "function": function}


def _as_result(event: ToolCallDelta, outcome: Outcome) -> Message:
    content = json.dumps(outcome.result, ensure_ascii=False)
    return {"role": "tool", "tool_call_id": event.id, "name": event.name, "content": content}
