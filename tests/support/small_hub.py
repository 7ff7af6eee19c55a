"""A Hub of one repository on this machine, over HTTP, that can be told to break connections."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class SmallHub:
    """Serves the files of a folder as `org/tiny`, to real clients: set HF_ENDPOINT to `url`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gone: set[str] = set()  # files that nobody may have: status 403
        self.break_after: dict[str, int] = {}  # file -> bytes sent before the connection breaks, once
        self.sent: list[tuple[str, int]] = []  # (file, first byte) of every download
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub._answer(self, with_body=False)

            def do_GET(self) -> None:
                hub._answer(self, with_body=True)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> SmallHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        if request.path.startswith("/api/models/org/tiny"):
            self._list(request)
            return
        match = re.fullmatch(rf"/org/tiny/resolve/(?:main|{COMMIT})/([\w.-]+)", request.path.split("?")[0])
        file = self.folder / match[1] if match else None
        if file is None or not file.is_file():
            _reply(request, 404, b"")
        elif file.name in self.gone:
            _reply(request, 403, b"")
        else:
            self._send(request, file, with_body)

    def _list(self, request: BaseHTTPRequestHandler) -> None:
        names = sorted(path.name for path in self.folder.iterdir())
        if "/tree/" in request.path:
            data: object = [
                dict(type="file", path=name, size=(self.folder / name).stat().st_size, oid=_etag(name))
                for name in names
            ]
        else:
            data = dict(id="org/tiny", sha=COMMIT, siblings=[dict(rfilename=name) for name in names])
        _reply(request, 200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _send(self, request: BaseHTTPRequestHandler, file: Path, with_body: bool) -> None:
        data = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        headers = {"ETag": f'"{_etag(file.name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if not with_body:
            _reply(request, 200, data, headers, with_body=False)
            return
        self.sent.append((file.name, first))
        cut = self.break_after.pop(file.name, None)
        _reply(request, 206 if first else 200, data[first:], headers, cut=cut)


def _etag(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


def _reply(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: dict[str, str] | None = None,
    *,
    with_body: bool = True,
    cut: int | None = None,
) -> None:
    request.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
        request.send_header(name, value)
    request.end_headers()
    if with_body:
        request.wfile.write(body[:cut])
        request.wfile.flush()
    if cut is not None:
        request.close_connection = True
