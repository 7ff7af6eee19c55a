"""The real service and MQTT transport on an engine that gives prepared answers: for tests of applications."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gemma_edge.runtime.chat import ChatTemplate
from gemma_edge.runtime.engine import CancelSignal
from gemma_edge.runtime.sampler import SamplingParams
from gemma_edge.runtime.service import Service
from gemma_edge.runtime.stats import EngineFinish, GenerationStats
from gemma_edge.runtime.tokenizer import Tokenizer
from gemma_edge.runtime.transports.mqtt import MqttTransport
from gemma_edge.runtime.transports.mqtt_address import BrokerAddress, Topics
from gemma_edge.runtime.transports.openai_api import ApiLimits

from .scripted_daemon import TEMPLATE, small_tokenizer

MODEL_NAME = "prepared"


@dataclass
class AnsweringEngine:
    """Answers the n-th request with the n-th text, the last one again and again; `gate` holds it up."""

    tokenizer: Tokenizer
    answers: list[str]
    context: int = 32_768
    gate: threading.Event = field(default_factory=threading.Event)
    prompts: list[str] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    last_stats: GenerationStats | None = None

    def __post_init__(self) -> None:
        self.gate.set()
        self.eos = frozenset({self.tokenizer.controls["<eos>"], self.tokenizer.controls["<turn|>"]})

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_new_tokens: int,
        cancel: CancelSignal | None = None,
    ) -> Iterator[int]:
        self.prompts.append(self.tokenizer.decode(prompt_ids, skip_special=False))
        self.params.append(params)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        finish: EngineFinish = "stop"
        count = 0
        try:
            while not self.gate.wait(0.01):
                if cancel is not None and cancel.is_set():
                    finish = "cancelled"
                    return
            for token in self.tokenizer.encode(answer):
                if count == max_new_tokens:
                    finish = "length"
                    return
                count += 1
                yield token
        finally:
            self.last_stats = GenerationStats(len(prompt_ids), count, 0.0, 0.0, 0.0, count, finish)


@dataclass
class AnsweringDaemon:
    service: Service
    engine: AnsweringEngine
    transport: MqttTransport


@contextmanager
def answering_daemon(
    folder: Path, port: int, topics: Topics, answers: list[str], *, queue_size: int = 8, context: int = 32_768
) -> Iterator[AnsweringDaemon]:
    """A daemon on the broker at `port` that is online when the block begins."""
    tokenizer = small_tokenizer(folder)
    engine = AnsweringEngine(tokenizer, list(answers), context)
    service = Service(engine, tokenizer, ChatTemplate(TEMPLATE), model_name=MODEL_NAME, queue_size=queue_size)
    transport = MqttTransport(service, ApiLimits(MODEL_NAME), BrokerAddress("127.0.0.1", port), topics)
    transport.start()
    try:
        assert transport.wait_online(10), "the daemon did not get to the broker"
        yield AnsweringDaemon(service, engine, transport)
    finally:
        engine.gate.set()
        transport.begin_drain()
        service.drain(5)
        transport.close(5)


def wait_until(holds, timeout_s: float = 60.0) -> None:  # type: ignore[no-untyped-def]
    """Return once `holds()` is true; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)
