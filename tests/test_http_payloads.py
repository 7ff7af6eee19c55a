"""Any payload becomes a request or a RequestError, never another exception: fuzzing of all input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_edge.runtime.errors import RequestError
from gemma_edge.runtime.service import Job, Service
from gemma_edge.runtime.transports.openai_api import (
    IGNORED,
    REFUSED,
    ApiLimits,
    Body,
    chat_call,
    parse_object,
    take_transaction,
    text_object,
)
from gemma_edge.runtime.transports.openai_reply import error_object, error_status

from .support.scripted_daemon import MODEL_NAME, scripted_service

LIMITS = ApiLimits(MODEL_NAME, max_tokens=100)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "robot"])
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": values}), max_size=2
)
calls = st.lists(
    st.fixed_dictionaries(
        {"id": st.sampled_from(["a", "b"]), "type": st.just("function")},
        optional={
            "function": st.fixed_dictionaries(
                {
                    "name": st.sampled_from(["lamp", "no good"]),
                    "arguments": st.sampled_from(["{}", "[1", "[" * 9999]) | values,
                }
            )
        },
    ),
    max_size=2,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": roles},
        optional={
            "content": st.text(max_size=30) | parts | values,
            "tool_calls": calls | values,
            "tool_call_id": st.sampled_from(["a", "b", "c"]) | values,
            "name": values,
            "reasoning_content": values,
        },
    ),
    max_size=4,
)
tools = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function")},
        optional={"function": st.fixed_dictionaries({"name": st.sampled_from(["lamp", "x y"])}, optional={
            "description": values, "parameters": values, "strict": values})},
    ),
    max_size=2,
)  # fmt: skip
known = sorted(
    {field.name for field in msgspec.structs.fields(Body)} | set(REFUSED) | IGNORED | {"transaction"}
)
bodies = st.builds(
    lambda some, more: more | some,
    st.fixed_dictionaries({}, optional={"messages": messages, "tools": tools}),
    st.dictionaries(st.sampled_from(known) | st.text(max_size=8), values, max_size=4),
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with scripted_service(tmp_path_factory.mktemp("fuzz"))[0] as running:
        yield running


def outcome(service: Service, payload: bytes) -> Job | RequestError:
    """What a transport makes of a payload."""
    try:
        data = parse_object(payload) if payload.lstrip()[:1] == b"{" else text_object(payload)
        take_transaction(data)
        job = service.submit(chat_call(data, LIMITS).request)
    except RequestError as error:
        assert 400 <= error_status(error) < 500
        encoded = msgspec.json.encode(error_object(error))
        assert len(encoded) < 2000, "an error must not echo the payload"
        return error
    job.cancel()
    for _ in job.events():
        pass
    return job


fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.binary(max_size=200))
def test_any_bytes(service: Service, payload: bytes) -> None:
    outcome(service, payload)


@fuzz
@given(bodies)
def test_any_json_object(service: Service, data: dict[str, Any]) -> None:
    outcome(service, json.dumps(data).encode())


VALID = json.dumps(
    {
        "model": MODEL_NAME,
        "messages": [
            {"role": "system", "content": "You measure."},
            {"role": "user", "content": "é 😀 hello"},
        ],
        "temperature": 0.5,
        "max_tokens": 10,
        "stop": ["a"],
        "tools": [{"type": "function", "function": {"name": "lamp", "parameters": {"type": "object"}}}],
    }
).encode()


@fuzz
@given(st.integers(0, len(VALID)), st.integers(0, 12), st.binary(max_size=6))
def test_a_damaged_request(service: Service, at: int, drop: int, insert: bytes) -> None:
    outcome(service, VALID[:at] + insert + VALID[at + drop :])


def test_the_undamaged_request_is_accepted(service: Service) -> None:
    assert isinstance(outcome(service, VALID), Job)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"messages": [{"role": "user", "content": "\\ud800 x"}]}',
        b'{"messages": [{"role": "user", "content": "\\u0000"}], "seed": -99999999999999999999999}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "timeout_s": 1e308}',
        b'{"messages": [{"role": "user", "content": "x"}], "model": "' + b"m" * 100_000 + b'"}',
        b'{"' + b"k" * 100_000 + b'": 1}',
        b'{"messages": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "tools": [' + b"[" * 800 + b"]" * 800 + b"]}",
        b'{"messages": [{"role": "' + b"r" * 100_000 + b'", "content": "x"}]}',
        b"\xef\xbb\xbfhello",
        b"\x00" * 1000,
    ],
    ids=lambda payload: repr(payload[:50]),
)
def test_odd_payloads(service: Service, payload: bytes) -> None:
    outcome(service, payload)


@pytest.mark.parametrize("transaction", [None, 0, -5, 2**63 - 1, "", "t" * 256])
def test_transactions(transaction: Any) -> None:
    data = {"transaction": transaction, "other": 1}
    assert take_transaction(data) == transaction and data == {"other": 1}


@pytest.mark.parametrize("transaction", [True, 1.5, 2**63, "t" * 257, [], {}])
def test_transactions_that_are_refused(transaction: Any) -> None:
    with pytest.raises(RequestError, match="transaction"):
        take_transaction({"transaction": transaction})
