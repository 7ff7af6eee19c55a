"""The service: events, stop strings, the bounded queue, cancelling, deadlines, errors, draining."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from gemma_edge.runtime.answer import Answer
from gemma_edge.runtime.chat import ChatTemplate, load_template
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.errors import RequestError
from gemma_edge.runtime.sampler import SamplingParams
from gemma_edge.runtime.service import (
    ChatRequest,
    Done,
    Event,
    Failed,
    Job,
    ReasoningDelta,
    Service,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from gemma_edge.runtime.tokenizer import load_tokenizer

from .support.scripted_engine import ScriptedEngine
from .support.tokenizer_files import tokenizer_pair

TOKENIZER = tokenizer_pair("tiny")[1]
TEMPLATE = ChatTemplate(
    (Path(__file__).parent / "data" / "chat_template.jinja").read_text(encoding="utf-8"),
    {"bos_token": "<bos>"},
)
END = TOKENIZER.controls["<turn|>"]
HELLO = [{"role": "user", "content": "Hello"}]


def service_of(
    answer: str | Callable[[Sequence[int]], Sequence[int]], *, queue_size: int = 8, **options
) -> Service:
    """A service whose engine answers with this text, markers and all."""
    script = (lambda _: [*TOKENIZER.encode(answer), END]) if isinstance(answer, str) else answer
    engine = ScriptedEngine(script, eos=[END], **options)
    service = Service(engine, TOKENIZER, TEMPLATE, model_name="test", queue_size=queue_size)
    service.engine = engine  # type: ignore[attr-defined]
    return service


def ask(service: Service, **request) -> list[Event]:
    return list(service.submit(ChatRequest(request.pop("messages", HELLO), **request)).events())


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.002)


def test_an_answer_as_events():
    with service_of("Hi there, 😀!") as service:
        events = ask(service)
        assert text_of(events) == "Hi there, 😀!"
        done = events[-1]
        assert isinstance(done, Done)
        prompt = TEMPLATE.encode(TOKENIZER, HELLO)
        assert service.engine.prompts == [prompt]
        assert done.finish_reason == "stop"
        assert done.usage == Usage(len(prompt), len(TOKENIZER.encode("Hi there, 😀!")))
        assert done.stats is service.engine.last_stats


def test_control_tokens_never_reach_the_text():
    with service_of('a<|turn>b<pad>c<|"|>d<channel|>e<unk>f') as service:
        assert text_of(ask(service)) == "abcdef"


def test_reasoning_and_tool_calls_are_events_of_their_own():
    answer = (
        "<|channel>thought\nhm, so<channel|>Well."
        '<|tool_call>call:go{to:<|"|>é<|"|>,n:1}<tool_call|><|tool_call>call:b{}<tool_call|>'
    )
    with service_of(answer) as service:
        events = ask(service)
    assert "".join(e.text for e in events if isinstance(e, ReasoningDelta)) == "hm, so"
    assert text_of(events) == "Well."
    calls = [event for event in events if isinstance(event, ToolCallDelta)]
    assert [(call.index, call.name, json.loads(call.arguments_json)) for call in calls] == [
        (0, "go", {"to": "é", "n": 1}),
        (1, "b", {}),
    ]
    assert calls[0].id != calls[1].id
    assert events[-1].finish_reason == "tool_calls"


def test_a_malformed_tool_call_is_text_and_logged(caplog):
    with service_of("<|tool_call>call:go{to}<tool_call|>") as service:
        events = ask(service)
    assert text_of(events) == "call:go{to}"
    assert events[-1].finish_reason == "stop"
    assert "malformed tool call" in caplog.text


@pytest.mark.parametrize("stop", [("STOP",), ("T is", "STOP"), (" STOP is not",)])
def test_a_stop_string_ends_the_answer_and_the_engine(stop):
    with service_of("one two STOP is not shown " * 20) as service:
        events = ask(service, stop=stop)
        assert text_of(events) in ("one two ", "one two STO", "one two")
        assert not any(word in text_of(events) for word in stop)
        assert events[-1].finish_reason == "stop"
        assert service.engine.yielded < 40
        assert events[-1].usage.completion_tokens == service.engine.yielded


def test_a_held_back_beginning_of_a_stop_string_comes_at_the_end():
    with service_of("this is ST") as service:
        assert text_of(ask(service, stop=("STOP",))) == "this is ST"


def test_stop_after_is_a_cap_that_is_never_refused():
    with service_of(lambda _: TOKENIZER.encode("one two three four five six seven")) as service:
        done = ask(service, stop_after=2)[-1]
        assert isinstance(done, Done) and done.finish_reason == "length" and done.usage.completion_tokens == 2
        assert isinstance(ask(service, stop_after=10**9)[-1], Done)


def test_length_and_the_default_of_what_fits():
    with service_of(lambda _: TOKENIZER.encode("a" * 1000), context=100) as service:
        events = ask(service, max_tokens=7)
        assert events[-1].finish_reason == "length"
        assert events[-1].usage.completion_tokens == 7
        events = ask(service)
        assert sum((events[-1].usage.prompt_tokens, events[-1].usage.completion_tokens)) == 100


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"messages": []}, "invalid_request"),
        ({"max_tokens": 0}, "invalid_request"),
        ({"stop": ("",)}, "invalid_request"),
        ({"timeout_s": 0}, "invalid_request"),
        ({"timeout_s": float("nan")}, "invalid_request"),
        ({"max_tokens": 4096}, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "ab " * 5000}]}, "context_length_exceeded"),
    ],
)
def test_bad_requests_are_refused_at_once(request_, code):
    with service_of("x") as service:
        with pytest.raises(RequestError) as error:
            ask(service, **request_)
        assert error.value.code == code
        assert service.health()["counts"]["accepted"] == 0


class Held:
    """A service whose engine waits for `gate` before each token."""

    def __init__(self, queue_size: int = 2) -> None:
        self.gate = threading.Semaphore(0)
        self.service = service_of("one two three", gate=self.gate, queue_size=queue_size)

    def submit(self, **options) -> Job:
        return self.service.submit(ChatRequest(HELLO, **options))

    def running(self) -> Job:
        """Submit one job and wait until the engine has it."""
        job = self.submit()
        wait_for(lambda: self.service.health()["state"] == "generating")
        return job

    def open(self) -> None:
        self.gate.release(10_000)


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.open()
    held.service.drain(10)


def test_a_full_queue_says_busy_at_once(held):
    first = held.running()
    waiting = [held.submit(), held.submit()]
    with pytest.raises(RequestError) as error:  # `first` does not end before `open`
        held.submit()
    assert error.value.code == "busy"
    assert held.service.health()["queue_length"] == 2
    held.open()
    assert all(isinstance(list(job.events())[-1], Done) for job in (first, *waiting))
    counts = held.service.health()["counts"]
    assert (counts["accepted"], counts["completed"], counts["busy"]) == (3, 3, 1)


def test_cancelling_while_waiting_frees_the_place(held):
    first = held.running()
    second, third = held.submit(), held.submit()
    second.cancel()
    (last,) = second.events()
    assert last == Done("cancelled", Usage(len(second.prompt_ids), 0), None)
    fourth = held.submit()
    held.open()
    assert all(text_of(list(job.events())) == "one two three" for job in (first, third, fourth))
    assert len(held.service.engine.prompts) == 3


def test_cancelling_while_generating(held):
    job = held.running()
    held.gate.release(2)
    events = job.events()
    first = next(events)
    job.cancel()
    rest = list(events)
    assert isinstance(first, TextDelta)
    assert rest[-1].finish_reason == "cancelled"
    assert rest[-1].usage.completion_tokens <= 3
    assert text_of(ask_open(held)) == "one two three"


def ask_open(held: Held) -> list[Event]:
    held.open()
    return list(held.submit().events())


def test_leaving_the_events_cancels(held):
    job = held.running()
    held.gate.release(1)
    for _ in job.events():
        break
    wait_for(lambda: held.service.health()["counts"]["cancelled"] == 1)


def test_a_deadline_counts_the_wait_and_the_work(held):
    held.running()
    waiting = held.submit(timeout_s=0.05)
    (last,) = waiting.events()
    assert isinstance(last, Failed) and last.code == "timeout"
    held.open()
    wait_for(lambda: held.service.health()["state"] == "ready")
    while held.gate.acquire(blocking=False):
        pass
    running = held.submit(timeout_s=0.05)
    assert list(running.events())[-1].code == "timeout"
    wait_for(lambda: held.service.health()["state"] == "ready")
    assert text_of(ask_open(held)) == "one two three"
    counts = held.service.health()["counts"]
    assert (counts["failed"], counts["cancelled"], counts["completed"]) == (2, 0, 2)


def test_an_error_in_the_engine_fails_the_request_alone(caplog):
    def script(prompt: Sequence[int]) -> Iterator[int]:
        yield from TOKENIZER.encode("so far")
        if len(service.engine.prompts) == 1:
            raise MemoryError("secret detail")

    service = service_of(script)
    with service:
        events = ask(service)
        assert text_of(events) == "so far"
        assert events[-1] == Failed("internal_error", "the engine failed; the daemon's log has the cause")
        assert "secret detail" in caplog.text
        assert isinstance(ask(service)[-1], Done)
        assert service.health()["counts"]["failed"] == 1


def test_text_nobody_reads_is_merged():
    with service_of("word " * 200) as service:
        job = service.submit(ChatRequest(HELLO))
        wait_for(lambda: job.closed)
        events = list(job.events())
        assert len(events) == 2
        assert text_of(events) == "word " * 200
        assert list(job.events()) == []


def test_draining_finishes_what_was_taken(held):
    jobs = [held.running(), held.submit()]
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(held.service.drain(10)))
    thread.start()
    wait_for(lambda: held.service.health()["state"] == "draining")
    with pytest.raises(RequestError) as error:
        held.submit()
    assert error.value.code == "shutting_down"
    held.open()
    assert all(text_of(list(job.events())) == "one two three" for job in jobs)
    thread.join()
    assert done == [True]
    assert held.service.health()["state"] == "stopped"


def test_draining_out_of_time_fails_the_rest(held):
    jobs = [held.running(), held.submit()]
    assert held.service.drain(0.02) is False
    for job in jobs:
        last = list(job.events())[-1]
        assert isinstance(last, Failed) and last.code == "shutting_down"


def test_a_real_engine_serves_many_threads(tiny_bundle):
    tiny = tiny_bundle(context=192, chunk=16)
    engine, tokenizer, template = Engine(tiny.bundle), load_tokenizer(tiny.bundle), load_template(tiny.bundle)
    questions = [[{"role": "user", "content": word * 5}] for word in ("light ", "door ", "window ")]
    alone = []
    for messages in questions:
        ids = list(engine.generate(template.encode(tokenizer, messages), max_new_tokens=20))
        answer = Answer(tokenizer)
        deltas = [delta for token in ids for delta in answer.push(token)] + answer.finish()
        alone.append((text_of(deltas), len(ids)))
    with Service(engine, tokenizer, template, model_name="tiny") as service:
        jobs = [service.submit(ChatRequest(messages, max_tokens=20)) for messages in questions]
        answers = [list(job.events()) for job in jobs]
    assert [(text_of(events), events[-1].usage.completion_tokens) for events in answers] == alone
    assert len(set(alone)) == 3


def test_many_threads_at_once():
    with service_of("fine", queue_size=64) as service:
        results: list[str] = []

        def one() -> None:
            results.append(text_of(ask(service, params=SamplingParams(seed=1))))

        threads = [threading.Thread(target=one) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == ["fine"] * 30
        health = service.health()
        assert health["counts"]["completed"] == 30
        assert health["queue_length"] == 0
        assert (health["model"], health["context"], health["queue_size"]) == ("test", 4096, 64)
        json.dumps(health)
