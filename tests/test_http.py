"""The HTTP transport with real clients: raw sockets, curl and the openai package, over a scripted engine."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from gemma_edge.runtime.service import Service
from gemma_edge.runtime.transports.http import HttpServer
from gemma_edge.runtime.transports.openai_api import MAX_BODY_BYTES, ApiLimits
from gemma_edge.runtime.transports.sockets import bind_tcp, bind_unix

from .support.daemon_process import UnixConnection, chat, request, stream, user, wait_until
from .support.scripted_daemon import CONTEXT, MODEL_NAME, ReplyEngine, scripted_service


class Served:
    """A running server: its socket, and what is behind it."""

    def __init__(self, path: Path, service: Service, engine: ReplyEngine, tcp_port: int) -> None:
        self.path, self.service, self.engine, self.tcp_port = path, service, engine, tcp_port

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        return request(self.path, method, path, body, headers)

    def chat(self, text: str, **more: Any) -> tuple[int, dict[str, str], Any]:
        return chat(self.path, text, **more)

    def client(self, **more: Any) -> openai.OpenAI:
        transport = httpx2.HTTPTransport(uds=str(self.path))
        return openai.OpenAI(
            base_url="http://localhost/v1",
            api_key="none",
            http_client=httpx2.Client(transport=transport),
            **more,
        )


@contextmanager
def serving(folder: Path, *, queue_size: int = 8, step_s: float = 0.0, **limits: Any) -> Iterator[Served]:
    service, engine = scripted_service(
        folder, queue_size=queue_size, step_s=step_s, max_answer_tokens=limits.get("max_tokens")
    )
    unix = bind_unix(folder / "s" / "test.sock")
    tcp = bind_tcp("127.0.0.1:0", allow_remote=False)
    server = HttpServer(service, ApiLimits(MODEL_NAME, **limits), [unix.socket, tcp])
    server.start()
    try:
        yield Served(unix.path, service, engine, tcp.getsockname()[1])
    finally:
        service.drain(0.0)
        server.close(10)
        unix.close()
        tcp.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("http"), max_tokens=1000) as server:
        yield server


def test_completion_has_the_shape_of_openais(served: Served) -> None:
    status, headers, body = served.chat("hello", model=MODEL_NAME)
    assert status == 200 and headers["content-type"] == "application/json"
    assert (
        body["object"] == "chat.completion"
        and body["model"] == MODEL_NAME
        and body["id"].startswith("chatcmpl-")
    )
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "You said: hello"}
    assert choice["finish_reason"] == "stop" and choice["index"] == 0
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert body["timings"]["decode_tokens_per_s"] > 0


def test_parameters_reach_the_engine(served: Served) -> None:
    served.chat(
        "hello",
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.1,
        seed=-1,
        max_completion_tokens=50,
        user="someone",
        metadata={"a": "b"},
        n=1,
        logit_bias={},
        response_format={"type": "text"},
    )
    _, params, max_new_tokens = served.engine.seen[-1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.repetition_penalty, params.seed, max_new_tokens) == (1.1, 2**64 - 1, 50)


def test_default_length_is_the_daemons_and_sampling_is_greedy(served: Served) -> None:
    served.chat("hello")
    _, params, max_new_tokens = served.engine.seen[-1]
    assert params.temperature == 0.0 and max_new_tokens == 1000
    served.chat("word " * 1500)
    assert 0 < served.engine.seen[-1][2] < CONTEXT - 1500  # what is left of the context


@pytest.mark.parametrize("stop", ["said", ["never", "said"]])
def test_stop_strings(served: Served, stop: Any) -> None:
    _, _, body = served.chat("hello", stop=stop)
    assert (
        body["choices"][0]["message"]["content"] == "You " and body["choices"][0]["finish_reason"] == "stop"
    )


def test_length_is_reported(served: Served) -> None:
    _, _, body = served.chat("repeat 50 word", max_tokens=5)
    assert body["choices"][0]["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 5


def test_tool_calls_and_their_results(served: Served) -> None:
    tools = [
        {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}
    ]
    _, _, body = served.chat("call lamp", tools=tools, tool_choice="auto")
    message = body["choices"][0]["message"]
    assert body["choices"][0]["finish_reason"] == "tool_calls" and message["content"] is None
    call = message["tool_calls"][0]
    assert call["function"]["name"] == "lamp"
    assert json.loads(call["function"]["arguments"]) == {"room": "kitchen", "on": True}
    assert "lamp" in served.engine.seen[-1][0].split("<|turn>user")[0]
    back = [*user("call lamp"), message, {"role": "tool", "tool_call_id": call["id"], "content": "it is on"}]
    status, _, body = served.request("POST", "/v1/chat/completions", {"messages": back})
    assert status == 200 and body["choices"][0]["message"]["content"] == "You said: it is on"


def test_tool_choice_none_hides_the_tools(served: Served) -> None:
    tools = [{"type": "function", "function": {"name": "lamp"}}]
    served.chat("hello", tools=tools, tool_choice="none")
    assert "lamp" not in served.engine.seen[-1][0]


def test_reasoning_is_apart_from_the_text(served: Served) -> None:
    _, _, body = served.chat("think")
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Done.", "reasoning_content": "It is simple."}


@pytest.mark.parametrize(
    "how", [{"enable_thinking": True}, {"chat_template_kwargs": {"enable_thinking": True}}]
)
def test_thinking_is_switched_on(served: Served, how: dict[str, Any]) -> None:
    served.chat("hello", **how)
    assert served.engine.seen[-1][0].endswith("<|channel>")


def test_streamed_chunks(served: Served) -> None:
    events = stream(
        served.path, {"messages": user("hello"), "stream": True, "stream_options": {"include_usage": True}}
    )
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len(
        {chunk["id"] for chunk in chunks}
    ) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == "You said: hello"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and chunks[-2]["usage"] is None
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"logprobs": True}, "logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "a"}}}, "tool_choice"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]},
        "tools[0].function.strict",
    ),
    ({"tools": [{"type": "function", "function": {"name": "not good"}}]}, "tools[0].function.name"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"temprature": 1}, "temprature"),
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1001}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, "enable_thinking"),
    ({"transaction": "a"}, "transaction"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
    ),
]


@pytest.mark.parametrize(("more", "param"), REFUSED, ids=[json.dumps(more)[:60] for more, _ in REFUSED])
def test_refused_parameters_are_named(served: Served, more: dict[str, Any], param: str) -> None:
    before = len(served.engine.seen)
    status, _, body = served.request("POST", "/v1/chat/completions", {"messages": user("hello")} | more)
    assert status == 400, body
    error = body["error"]
    assert error["type"] == "invalid_request_error" and error["code"] == "invalid_request"
    assert error["param"] == param and param.split(".")[-1].split("[")[0] in error["message"]
    assert len(served.engine.seen) == before


def test_a_typing_error_gets_a_suggestion(served: Served) -> None:
    assert "did you mean `temperature`?" in served.chat("hello", temprature=1)[2]["error"]["message"]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 50_000, b'{"messages": ' + b"[" * 50_000]
)
def test_broken_bodies_are_refused(served: Served, raw: bytes) -> None:
    status, _, body = served.request("POST", "/v1/chat/completions", raw)
    assert status == 400 and body["error"]["code"] == "invalid_request"


def test_the_body_has_a_cap(served: Served) -> None:
    raw = b'{"messages": [{"role": "user", "content": "' + b"x" * MAX_BODY_BYTES + b'"}]}'
    assert served.request("POST", "/v1/chat/completions", raw)[0] == 413
    connection = UnixConnection(served.path)
    connection.request("POST", "/v1/chat/completions", iter([raw[:1000], raw[1000:]]), encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413 and json.loads(response.read())["error"]["code"] == "payload_too_large"
    connection.close()
    huge = UnixConnection(served.path)  # refused before it is sent
    huge.putrequest("POST", "/v1/chat/completions")
    huge.putheader("content-length", "99999999999999999999")
    huge.endheaders()
    assert huge.getresponse().status == 413
    huge.close()


def test_too_long_for_the_context(served: Served) -> None:
    status, _, body = served.chat("word " * 3000)
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"


def test_models_health_and_unknown_paths(served: Served) -> None:
    status, _, models = served.request("GET", "/v1/models")
    assert status == 200 and [model["id"] for model in models["data"]] == [MODEL_NAME]
    assert served.request("GET", f"/v1/models/{MODEL_NAME}")[2]["object"] == "model"
    assert served.request("GET", "/v1/models/gpt-9")[2]["error"]["code"] == "model_not_found"
    status, _, body = served.chat("hello", model="gpt-9")
    assert (
        status == 404
        and body["error"]["code"] == "model_not_found"
        and MODEL_NAME in body["error"]["message"]
    )
    status, _, health = served.request("GET", "/health")
    assert status == 200 and health["state"] == "ready" and health["model"] == MODEL_NAME
    assert served.request("GET", "/v2/nothing")[2]["error"]["code"] == "not_found"
    assert served.request("GET", "/v1/chat/completions")[0] == 405


def test_a_failing_engine_is_a_500_and_does_not_stop_the_daemon(served: Served) -> None:
    status, _, body = served.chat("fail")
    assert (
        status == 500 and body["error"]["type"] == "server_error" and "script" not in body["error"]["message"]
    )
    assert served.chat("hello")[0] == 200


def test_a_full_queue_is_busy_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, queue_size=1, step_s=0.02) as served:
        slow = [threading.Thread(target=served.chat, args=("repeat 100 word",)) for _ in range(2)]
        for number, thread in enumerate(slow):
            thread.start()
            wait_until(lambda number=number: served.service.health()["counts"]["accepted"] == number + 1)
        wait_until(lambda: served.service.health()["queue_length"] == 1)
        status, headers, body = served.chat("hello")
        assert status == 429 and int(headers["retry-after"]) > 0
        assert body["error"]["code"] == "busy" and body["error"]["type"] == "rate_limit_error"
        for thread in slow:
            thread.join()
        assert served.chat("hello")[0] == 200


def test_timeout_is_a_504(tmp_path: Path) -> None:
    with serving(tmp_path, step_s=0.05) as served:
        status, _, body = served.chat("repeat 500 word", timeout_s=0.3)
        assert status == 504 and body["error"]["code"] == "timeout"


def test_draining_is_a_503(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.service.drain(1.0)
        status, headers, body = served.chat("hello")
        assert status == 503 and body["error"]["code"] == "shutting_down" and "retry-after" in headers
        assert served.request("GET", "/health")[0] == 503


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_cancels_its_request(tmp_path: Path, streaming: bool) -> None:
    with serving(tmp_path, step_s=0.02) as served:
        connection = UnixConnection(served.path)
        body = {"messages": user("repeat 1000 word"), "stream": streaming}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        wait_until(lambda: served.service.health()["state"] == "generating")
        if streaming:
            connection.getresponse().readline()
        connection.close()
        connection.sock = None
        wait_until(lambda: served.service.health()["counts"]["cancelled"] == 1, 5)
        assert served.service.health()["state"] == "ready"


def test_a_waiting_request_of_a_client_that_leaves_frees_its_place(tmp_path: Path) -> None:
    with serving(tmp_path, queue_size=1, step_s=0.02) as served:
        slow = threading.Thread(target=served.chat, args=("repeat 150 word",))
        slow.start()
        wait_until(lambda: served.service.health()["state"] == "generating")
        connection = UnixConnection(served.path)
        connection.request("POST", "/v1/chat/completions", json.dumps({"messages": user("hello")}))
        wait_until(lambda: served.service.health()["queue_length"] == 1)
        connection.close()
        time.sleep(0.3)
        assert served.chat("hello")[0] == 200
        slow.join()


def test_an_error_in_mid_stream_ends_it_with_an_error_event(tmp_path: Path) -> None:
    with serving(tmp_path, step_s=0.05) as served:
        events = stream(served.path, {"messages": user("repeat 500 word"), "stream": True, "timeout_s": 0.5})
        assert json.loads(events[-1])["error"]["code"] == "timeout" and len(events) > 1


def test_tcp_keeps_web_pages_out(served: Served) -> None:
    def post(headers: dict[str, str]) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", served.tcp_port, timeout=10)
        connection.request("POST", "/v1/chat/completions", json.dumps({"messages": user("hello")}), headers)
        response = connection.getresponse()
        body = json.loads(response.read())
        connection.close()
        return response.status, body.get("error", {}).get("code", "")

    json_type = {"content-type": "application/json"}
    assert post(json_type)[0] == 200
    assert post({"content-type": "text/plain"}) == (415, "unsupported_media_type")
    assert post(json_type | {"host": "evil.example"}) == (403, "forbidden")
    assert post(json_type | {"host": f"localhost:{served.tcp_port}"})[0] == 200


def test_the_openai_client(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    answer = client.chat.completions.create(model=MODEL_NAME, messages=user("hello"), temperature=0, seed=1)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "You said: hello"
    text, usage = "", None
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=user("repeat 20 word"),  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 5, "enable_thinking": False},
    )
    for chunk in stream:
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        usage = chunk.usage or usage
    assert text.split() == ["word"] * 20 and usage is not None and usage.completion_tokens > 20
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL_NAME, messages=user("hello"), n=3)  # type: ignore[arg-type]
    assert refused.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=user("hello"))  # type: ignore[arg-type]


def test_the_openai_client_runs_a_tool_conversation(served: Served) -> None:
    client = served.client()
    tools: Any = [
        {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}
    ]
    messages: Any = user("call lamp")
    message = (
        client.chat.completions.create(model=MODEL_NAME, messages=messages, tools=tools).choices[0].message
    )
    assert message.tool_calls
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "on"}]
    answer = client.chat.completions.create(model=MODEL_NAME, messages=messages, tools=tools)
    assert answer.choices[0].message.content == "You said: on"


def test_curl(served: Served) -> None:
    curl = shutil.which("curl")
    assert curl, "curl is not installed (.ci/run installs it)"

    def run(*arguments: str) -> str:
        command = [curl, "-sS", "--unix-socket", str(served.path), *arguments]
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=30).stdout

    body = json.dumps({"messages": user("hello"), "stream": True})
    lines = run("-N", "http://localhost/v1/chat/completions", "-d", body).split("\n\n")
    assert lines[0].startswith("data: {") and lines[-2] == "data: [DONE]"
    assert json.loads(run("http://localhost/health"))["state"] == "ready"
