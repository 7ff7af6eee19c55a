"""Where the MQTT transport connects and which topics it uses: parsing and validation. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from ..errors import ConfigError

MAX_TOPIC_BYTES = 1024


@dataclass(frozen=True)
class BrokerAddress:
    """A broker, from its URL."""

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """The URL without credentials, for logs."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


def parse_broker_url(url: str, *, password: str | None = None) -> BrokerAddress:
    """`mqtt[s]://[user[:password]@]host[:port]`; `password` stands in for one that the URL lacks.

    Raises ConfigError, without repeating the URL: it may hold a password.
    """
    expected = "--mqtt: expected mqtt://[USER[:PASSWORD]@]HOST[:PORT], or mqtts://… for TLS"
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError as cause:
        raise ConfigError(f"{expected} ({cause})") from cause
    if parts.scheme not in ("mqtt", "mqtts"):
        raise ConfigError(f"{expected}; got the scheme {parts.scheme!r}")
    if not host or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(f"{expected}; nothing may follow the port")
    tls = parts.scheme == "mqtts"
    username = unquote(parts.username) if parts.username else None
    given = unquote(parts.password) if parts.password else password
    if given and not username:
        raise ConfigError(f"{expected}; a password needs a user name")
    return BrokerAddress(host, port or (8883 if tls else 1883), tls, username, given)


@dataclass(frozen=True)
class Topics:
    """The topics of one daemon. Raises ConfigError for a base or node that cannot be part of a topic."""

    base: str
    node: str

    def __post_init__(self) -> None:
        if not self.node or re.search(r"[/+#\s\x00-\x1f]", self.node) or len(self.node.encode()) > 128:
            raise ConfigError(f"--node {self.node!r}: expected a name without spaces, `/`, `+` and `#`")
        levels = self.base.split("/")
        if not all(levels) or re.search(r"[+#\x00-\x1f]", self.base) or self.base.startswith("$"):
            raise ConfigError(
                f"--base {self.base!r}: expected levels joined by `/`, without `+`, `#` and a leading `$`"
            )
        if len(self.base.encode()) > 256:
            raise ConfigError("--base: at most 256 bytes")

    @property
    def request(self) -> str:
        return f"{self.base}/{self.node}/request/chat"

    @property
    def response(self) -> str:
        """Where answers go when the request names no Response Topic."""
        return f"{self.base}/{self.node}/response/chat"

    @property
    def request_audio(self) -> str:
        return f"{self.base}/{self.node}/request/audio"

    @property
    def response_audio(self) -> str:
        return f"{self.base}/{self.node}/response/audio"

    @property
    def availability(self) -> str:
        return f"{self.base}/{self.node}/availability"

    def refusal(self, response_topic: str) -> str | None:
        """Why an answer must not be published there, or None: it may.

        Refused are wildcards, the broker's own `$` topics, every daemon's request topics (answers would be
        requests) and this daemon's other topics (an answer is not its availability).
        """
        if not response_topic or len(response_topic.encode("utf-8", "replace")) > MAX_TOPIC_BYTES:
            return f"the Response Topic must have 1 to {MAX_TOPIC_BYTES} bytes"
        if re.search(r"[+#\x00-\x1f\x7f]", response_topic):
            return "the Response Topic must not contain wildcards or control characters"
        if response_topic.startswith("$"):
            return "the Response Topic must not begin with `$`"
        if not response_topic.startswith(f"{self.base}/"):
            return None
        node, _, rest = response_topic[len(self.base) + 1 :].partition("/")
        if rest == "request" or rest.startswith("request/"):
            return "the Response Topic is a request topic"
        if node == self.node and not rest.startswith("response/"):
            return f"the Response Topic is one of the daemon's own; below {self.base}/{node}/ use response/…"
        return None


def node_from_hostname(hostname: str) -> str:
    """The default node name: the host's short name, made fit for a topic."""
    short = hostname.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", short).strip("-") or "node"
