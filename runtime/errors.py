"""The errors this package raises on purpose: the caller's mistakes apart from the peer's bad data.

Every message says what was expected, what came, and what to do next.
"""

from __future__ import annotations


class GemmaEdgeError(Exception):
    """Something the user can act on; the command line prints it without a traceback."""


class ConfigError(GemmaEdgeError):
    """A file the user wrote (profile, recipe, application config) is not valid."""


class BundleError(GemmaEdgeError):
    """A bundle is missing, incomplete, damaged or of another format version."""


class RequestError(GemmaEdgeError):
    """A request cannot be served as asked.

    code: a stable word for programs, the OpenAI one where there is one (`context_length_exceeded`,
    `invalid_request`, `busy`, `cancelled`, `timeout`, `shutting_down`, `internal_error`).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class AudioError(RequestError):
    """What came as sound cannot be heard: damaged, of an unknown kind, too long."""

    def __init__(self, message: str) -> None:
        super().__init__("invalid_request", message)
