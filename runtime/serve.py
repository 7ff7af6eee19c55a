"""`gemma-edge serve`: opens a bundle, starts the transports, shuts down in order. Knows no protocol.

bind the sockets -> load the model -> serve -> SIGTERM: refuse new requests, finish, say goodbye, exit 0
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .bundle import Bundle, open_bundle
from .errors import ConfigError, GemmaEdgeError, RequestError
from .options import add_engine_arguments, open_engine, pin
from .service import MAX_TIMEOUT_S, Service
from .start import add_start_arguments, load_prepared
from .transcribe import language_code
from .transports.mqtt_address import BrokerAddress, Topics, node_from_hostname, parse_broker_url
from .transports.openai_api import ApiLimits
from .transports.sockets import UnixListener, bind_tcp, bind_unix, default_socket_path, parse_uri
from .transports.sound_folder import SoundFolder

if TYPE_CHECKING:
    from .transports.http import HttpServer
    from .transports.mqtt import MqttTransport, Version
    from .transports.wyoming import WyomingServer

log = logging.getLogger(__name__)

FIRST_MQTT_WAIT_S = 3.0  # the ready line waits this long for the broker
GOODBYE_S = 5.0  # to deliver the last answers


@dataclass(frozen=True)
class MqttSettings:
    broker: BrokerAddress
    topics: Topics
    version: Version
    ca_file: Path | None
    sounds: SoundFolder | None


@dataclass(frozen=True)
class ServeSettings:
    """What the command line asked for, checked."""

    socket: Path | None  # None: no HTTP on a unix socket
    socket_mode: int
    tcp: str | None
    allow_remote: bool
    mqtt: MqttSettings | None
    max_tokens: int | None
    timeout_s: float
    drain_timeout_s: float
    languages: tuple[str, ...] = ("en",)  # of speech; the first is taken for granted
    wyoming: tuple[Path | str, ...] = ()  # unix sockets and HOST:PORT
    wyoming_system: str | None = None


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `serve`."""
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="bundle folder, made by `gemma-edge export`")
    http = parser.add_argument_group("HTTP (OpenAI-compatible)")
    http.add_argument(
        "--socket", metavar="PATH", type=Path, help=f"unix socket (default: {default_socket_path()})"
    )
    http.add_argument("--socket-mode", metavar="OCTAL", default="600", help="its permissions (default: 600)")
    http.add_argument("--tcp", metavar="HOST:PORT", help="listen on TCP too; loopback addresses only")
    http.add_argument(
        "--allow-remote",
        action="store_true",
        help="let --tcp and --wyoming listen on any address, without authentication",
    )
    http.add_argument("--no-http", action="store_true", help="serve MQTT or Wyoming only")
    mqtt = parser.add_argument_group("MQTT")
    mqtt.add_argument(
        "--mqtt",
        metavar="URL",
        default=os.environ.get("GEMMA_EDGE_MQTT"),
        help="mqtt://[USER[:PASSWORD]@]HOST[:1883] or mqtts://…[:8883] (default: $GEMMA_EDGE_MQTT; "
        "the password can come from $GEMMA_EDGE_MQTT_PASSWORD)",
    )
    mqtt.add_argument(
        "--mqtt-ca",
        metavar="FILE",
        type=Path,
        help="certificate that signs the broker's (default: the system's)",
    )
    mqtt.add_argument(
        "--mqtt-version", choices=("auto", "5", "3.1.1"), default="auto", help="auto: 5, else 3.1.1"
    )
    mqtt.add_argument(
        "--audio-folder",
        metavar="DIR",
        type=Path,
        help='sound files that requests may name, as in {"path": "x.wav"}; nothing outside of it is read',
    )
    mqtt.add_argument(
        "--base",
        metavar="TOPIC",
        default="gemma-edge",
        help="first levels of all topics (default: gemma-edge)",
    )
    mqtt.add_argument(
        "--node", metavar="NAME", help="this daemon's level below it (default: the host's name)"
    )
    wyoming = parser.add_argument_group("Wyoming (Home Assistant)")
    wyoming.add_argument(
        "--wyoming",
        metavar="URI",
        action="append",
        default=[],
        help="listen on unix:///PATH or tcp://HOST:PORT; loopback addresses only; may be given several times",
    )
    wyoming.add_argument(
        "--wyoming-system", metavar="TEXT", help="system prompt of conversations: how to answer"
    )
    audio = parser.add_argument_group("speech (bundles with an audio encoder)")
    audio.add_argument(
        "--no-audio", action="store_true", help="leave the bundle's audio encoder out of memory"
    )
    audio.add_argument(
        "--languages",
        metavar="CODES",
        default="en",
        help="languages that are spoken here, as in en,de; the first is that of requests which name none "
        "(default: en)",
    )
    speed = parser.add_argument_group("speed")
    add_engine_arguments(speed)
    add_start_arguments(speed)
    speed.add_argument(
        "--pin",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="run this system prompt at the start and keep its caches: a text, or JSON messages and tools "
        "(.json); may be repeated",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--queue-size", metavar="N", type=int, default=8, help="requests that may wait (default: 8)"
    )
    limits.add_argument(
        "--threads", metavar="N", type=int, help="threads of the engine (default: the bundle's)"
    )
    limits.add_argument(
        "--max-tokens", metavar="N", type=int, help="longest answer in tokens (default: what fits)"
    )
    limits.add_argument(
        "--timeout", metavar="S", type=float, default=600.0, help="longest time for a request (default: 600)"
    )
    limits.add_argument(
        "--drain-timeout",
        metavar="S",
        type=float,
        default=30.0,
        help="time to finish after SIGTERM (default: 30)",
    )


def settings_from(args: argparse.Namespace) -> ServeSettings:
    """Check the arguments. Raises ConfigError."""
    for name in ("queue_size", "threads", "max_tokens", "timeout"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
    if args.timeout > MAX_TIMEOUT_S:
        raise ConfigError(f"--timeout: expected at most {MAX_TIMEOUT_S:.0f}, got {args.timeout}")
    if not args.drain_timeout >= 0:
        raise ConfigError(f"--drain-timeout: expected 0 or more, got {args.drain_timeout}")
    if args.no_http and (args.tcp or args.socket):
        raise ConfigError("--no-http: leave out --socket and --tcp")
    if args.no_http and not args.mqtt and not args.wyoming:
        raise ConfigError("--no-http: then there must be something else, give --mqtt or --wyoming")
    if args.audio_folder is not None and not args.mqtt:
        raise ConfigError("--audio-folder: needs --mqtt")
    if args.wyoming_system is not None and not args.wyoming:
        raise ConfigError("--wyoming-system: needs --wyoming")
    try:
        mode = int(args.socket_mode, 8)
    except ValueError:
        mode = -1
    if mode not in range(0o1000) or not mode & 0o600 == 0o600:
        raise ConfigError(f"--socket-mode {args.socket_mode}: expected octal permissions, as in 600 or 660")
    return ServeSettings(
        socket=None if args.no_http else args.socket or default_socket_path(),
        socket_mode=mode,
        tcp=args.tcp,
        allow_remote=args.allow_remote,
        mqtt=_mqtt_settings(args) if args.mqtt else None,
        max_tokens=args.max_tokens,
        timeout_s=args.timeout,
        drain_timeout_s=args.drain_timeout,
        languages=_languages(args.languages),
        wyoming=tuple(parse_uri(uri, option="--wyoming") for uri in args.wyoming),
        wyoming_system=args.wyoming_system,
    )


def _languages(given: str) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(language_code(word) for word in given.split(",")))
    except RequestError as cause:
        raise ConfigError(f"--languages {given}: {cause}") from cause


def _mqtt_settings(args: argparse.Namespace) -> MqttSettings:
    broker = parse_broker_url(args.mqtt, password=os.environ.get("GEMMA_EDGE_MQTT_PASSWORD"))
    if args.mqtt_ca is not None and not broker.tls:
        raise ConfigError("--mqtt-ca: needs an mqtts:// address")
    if args.mqtt_ca is not None and not args.mqtt_ca.is_file():
        raise ConfigError(f"--mqtt-ca {args.mqtt_ca}: no such file")
    node = args.node if args.node is not None else node_from_hostname(socket.gethostname())
    try:
        sounds = None if args.audio_folder is None else SoundFolder(args.audio_folder)
    except ConfigError as cause:
        raise ConfigError(f"--audio-folder {cause}") from cause
    return MqttSettings(broker, Topics(args.base, node), args.mqtt_version, args.mqtt_ca, sounds)


def run_serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; the exit status."""
    settings = settings_from(args)
    bundle = open_bundle(args.bundle)

    def load(ready: Bundle) -> Service:
        from .chat import load_template
        from .sounds import open_ears
        from .tokenizer import load_tokenizer

        tokenizer = load_tokenizer(ready)
        with ThreadPoolExecutor(1) as pool:  # ONNX Runtime packs weights on one CPU: the engine's here
            opening = pool.submit(open_engine, ready, args, tokenizer, hears=not args.no_audio)
            template = load_template(ready)
            ears = None if args.no_audio else open_ears(ready, threads=args.threads)
            engine = opening.result()
        for file in args.pin:
            pin(engine, tokenizer, template, file)
        return Service(
            engine,
            tokenizer,
            template,
            model_name=ready.name,
            queue_size=args.queue_size,
            max_answer_tokens=args.max_tokens,
            ears=ears,
        )

    with Daemon(settings) as daemon:
        return daemon.run(lambda: load_prepared(bundle, args, load))


class Daemon:
    """What starts in order and is taken down in reverse. `with` takes the sockets and gives them back."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._unix: UnixListener | None = None
        self._tcp: socket.socket | None = None
        self._wyoming: list[socket.socket] = []
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe()  # a handler may write to it, but take no lock
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Daemon:
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(os.close, self._wake_read)
            cleanup.callback(os.close, self._wake_write)
            if self._settings.socket is not None or self._settings.tcp is not None:
                _require("HTTP", "http", ("starlette", "uvicorn", "python_multipart"))
            if self._settings.socket is not None:
                self._unix = bind_unix(self._settings.socket, self._settings.socket_mode)
                cleanup.callback(self._unix.close)
            if self._settings.tcp is not None:
                self._tcp = bind_tcp(self._settings.tcp, allow_remote=self._settings.allow_remote)
                cleanup.callback(self._tcp.close)
            for place in self._settings.wyoming:
                self._wyoming.append(self._bind_wyoming(place, cleanup))
            self._cleanup = cleanup.pop_all()
        return self

    def _bind_wyoming(self, place: Path | str, cleanup: contextlib.ExitStack) -> socket.socket:
        _require("Wyoming", "voice", ("wyoming",))
        if isinstance(place, Path):
            unix = bind_unix(place, self._settings.socket_mode, option="--wyoming")
            cleanup.callback(unix.close)
            return unix.socket
        tcp = bind_tcp(place, allow_remote=self._settings.allow_remote, option="--wyoming")
        cleanup.callback(tcp.close)
        return tcp

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def run(self, load: Callable[[], Service]) -> int:
        """Load the model, serve until a signal, drain; the exit status."""
        # From here on a signal is remembered, even during the load.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        service = load()
        limits = ApiLimits(
            service.model_name,
            self._settings.max_tokens,
            self._settings.timeout_s,
            hears=service.ears is not None,
            language=self._settings.languages[0],
        )
        http = self._start_http(service, limits)
        wyoming = self._start_wyoming(service, limits)
        mqtt = self._start_mqtt(service, limits)
        if mqtt and not self._stopping and not mqtt.wait_online(FIRST_MQTT_WAIT_S):
            log.warning("the broker does not answer yet; serving without it, and trying on")
        print(f"ready: {service.model_name} on {', '.join(self._addresses())}", file=sys.stderr, flush=True)
        _notify(f"READY=1\nSTATUS=serving {service.model_name}")
        healthy = self._wait({"HTTP": http, "Wyoming": wyoming})
        _notify("STOPPING=1")
        self._shut_down(service, http, mqtt, wyoming)
        return 0 if healthy else 1

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True
        os.write(self._wake_write, b"!")
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def _wait(self, servers: Mapping[str, HttpServer | WyomingServer | None]) -> bool:
        """Until a signal comes. False: a server ended by itself."""
        while not self._stopping:
            select.select([self._wake_read], [], [], 1.0)
            for name, server in servers.items():
                if server is not None and not server.running:
                    log.error("the %s server ended unexpectedly; its error is above", name)
                    return False
        return True

    def _start_http(self, service: Service, limits: ApiLimits) -> HttpServer | None:
        sockets = [self._unix.socket] if self._unix is not None else []
        sockets += [self._tcp] if self._tcp is not None else []
        if not sockets:
            return None
        from .transports.http import HttpServer

        server = HttpServer(service, limits, sockets, allow_remote=self._settings.allow_remote)
        server.start()
        return server

    def _start_wyoming(self, service: Service, limits: ApiLimits) -> WyomingServer | None:
        if not self._wyoming:
            return None
        from .transports.wyoming import Offer, WyomingServer

        offer = Offer(service, limits, self._settings.languages, self._settings.wyoming_system)
        server = WyomingServer(offer, self._wyoming)
        server.start()
        return server

    def _start_mqtt(self, service: Service, limits: ApiLimits) -> MqttTransport | None:
        mqtt = self._settings.mqtt
        if mqtt is None:
            return None
        from .transports.mqtt import MqttTransport

        transport = MqttTransport(
            service,
            limits,
            mqtt.broker,
            mqtt.topics,
            version=mqtt.version,
            ca_file=mqtt.ca_file,
            sounds=mqtt.sounds,
        )
        transport.start()
        return transport

    def _shut_down(
        self,
        service: Service,
        http: HttpServer | None,
        mqtt: MqttTransport | None,
        wyoming: WyomingServer | None,
    ) -> None:
        started = time.monotonic()
        log.info("stopping: finishing what was accepted, for at most %.0f s", self._settings.drain_timeout_s)
        if mqtt is not None:
            mqtt.begin_drain()
        whole = service.drain(self._settings.drain_timeout_s)
        if mqtt is not None:
            mqtt.close(GOODBYE_S)
        if wyoming is not None:
            wyoming.close(GOODBYE_S)
        if http is not None:
            http.close(GOODBYE_S)
        outcome = "all requests finished" if whole else "unfinished requests were cancelled"
        log.info("stopped after %.1f s, %s", time.monotonic() - started, outcome)

    def _addresses(self) -> list[str]:
        found = []
        if self._unix is not None:
            found.append(f"unix:{self._unix.path}")
        if self._tcp is not None:
            found.append(f"http://{_host_port(self._tcp)}")
        for bound in self._wyoming:
            if bound.family == socket.AF_UNIX:
                found.append(f"wyoming unix://{bound.getsockname()}")
            else:
                found.append(f"wyoming tcp://{_host_port(bound)}")
        if self._settings.mqtt is not None:
            found.append(f"{self._settings.mqtt.broker} ({self._settings.mqtt.topics.request})")
        return found


def _host_port(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _require(what: str, extra: str, packages: Sequence[str]) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            instead = ", or serve MQTT alone with --no-http" if extra == "http" else ""
            raise GemmaEdgeError(
                f"{what} needs {package}, which is not installed: pip install 'gemma-edge[{extra}]'{instead}"
            )


def _notify(state: str) -> None:
    """Tell systemd (`Type=notify`), if it asked."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
