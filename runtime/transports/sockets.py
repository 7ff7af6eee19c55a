"""The sockets that servers listen on, and the lock that keeps two daemons off one path. Knows no protocol."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, GemmaEdgeError

MAX_UNIX_PATH_BYTES = 107  # sun_path on Linux, less its NUL (macOS: 103)


def default_socket_path() -> Path:
    """`$XDG_RUNTIME_DIR/gemma-edge/gemma-edge.sock`, or one in a folder of the user's own in /tmp."""
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    if runtime_dir and Path(runtime_dir).is_dir():
        folder = Path(runtime_dir) / "gemma-edge"
    else:
        folder = Path(tempfile.gettempdir()) / f"gemma-edge-{os.getuid()}"
    return folder / "gemma-edge.sock"


@dataclass
class UnixListener:
    """A bound unix socket; `close()` gives the path back."""

    path: Path
    socket: socket.socket
    lock_fd: int
    inode: int

    def close(self) -> None:
        """Close it and remove the path, if that is still ours."""
        self.socket.close()
        with contextlib.suppress(OSError):
            if self.path.lstat().st_ino == self.inode:
                self.path.unlink()
        os.close(self.lock_fd)


def bind_unix(path: Path, mode: int = 0o600, *, option: str = "--socket") -> UnixListener:
    """Bind a stream socket at `path`. A socket that nobody listens on is replaced; a live one is an error.

    option: what the user gave the path with, for messages.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise ConfigError(
            f"{path}: a unix socket path has at most {MAX_UNIX_PATH_BYTES} bytes; give {option} a shorter one"
        )
    _private_folder(path.parent, option, own=path == default_socket_path())
    lock_fd = _lock(path, option)
    try:
        _remove_stale(path, option)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        umask = os.umask(0o777 & ~mode)  # born with its mode: nobody else can connect in between
        try:
            listener.bind(str(path))
        except OSError as cause:
            listener.close()
            raise GemmaEdgeError(
                f"{path}: cannot make the socket ({cause.strerror}); give another {option}"
            ) from cause
        finally:
            os.umask(umask)
        return UnixListener(path, listener, lock_fd, path.lstat().st_ino)
    except BaseException:
        os.close(lock_fd)
        raise


def bind_tcp(address: str, *, allow_remote: bool, option: str = "--tcp") -> socket.socket:
    """Bind HOST:PORT (`[::1]:8080` for IPv6). Without `allow_remote` the host must be a loopback address."""
    host, port = split_host_port(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as cause:
        raise ConfigError(f"{option} {address}: no such host ({cause.strerror})") from cause
    family, kind, protocol, _, bound = found[0]
    if not allow_remote and not ipaddress.ip_address(str(bound[0]).split("%")[0]).is_loopback:
        raise ConfigError(
            f"{option} {address}: not a loopback address, and there is no authentication; "
            "use 127.0.0.1, or add --allow-remote in a network where everyone may use the model"
        )
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(bound)
    except OSError as cause:
        listener.close()
        raise GemmaEdgeError(
            f"{option} {address}: cannot listen ({cause.strerror}); choose another port"
        ) from cause
    return listener


def parse_uri(uri: str, *, option: str) -> Path | str:
    """`unix:///path` to its path, `tcp://host:port` to `host:port`. Raises ConfigError."""
    scheme, _, rest = uri.partition("://")
    if scheme == "unix" and rest.startswith("/"):
        return Path(rest)
    if scheme == "tcp":
        with contextlib.suppress(ConfigError):
            split_host_port(rest)
            return rest
    raise ConfigError(
        f"{option} {uri}: expected unix:///PATH or tcp://HOST:PORT, as in tcp://127.0.0.1:10300"
    )


def split_host_port(address: str) -> tuple[str, int]:
    """`host:port` or `[ipv6]:port` to its parts. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or (":" in host and not bracketed) or not port.isascii() or not port.isdigit():
        raise ConfigError(f"{address!r}: expected HOST:PORT, as in 127.0.0.1:8080 or [::1]:8080")
    if int(port) > 65535:
        raise ConfigError(f"{address!r}: a port is at most 65535")
    return host, int(port)


def _private_folder(folder: Path, option: str, *, own: bool) -> None:
    """Make the folder, for its owner alone. The default one must be this user's, writable by nobody else."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
    except OSError as cause:
        raise GemmaEdgeError(
            f"{folder}: cannot make the socket's folder ({cause.strerror}); give {option}"
        ) from cause
    if own and (not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022):
        raise GemmaEdgeError(
            f"{folder}: exists, but is not a private folder of this user; remove it or give {option}"
        )


def _lock(path: Path, option: str) -> int:
    """Take `path`.lock; the kernel frees it when the process ends, however it ends. The file stays."""
    lock_path = f"{path}.lock"
    try:
        lock_fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as cause:
        raise GemmaEdgeError(
            f"{lock_path}: cannot be opened ({cause.strerror}); give another {option}"
        ) from cause
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as cause:
        os.close(lock_fd)
        raise GemmaEdgeError(
            f"{path}: another gemma-edge serves here; stop it, or give another {option}"
        ) from cause
    return lock_fd


def _remove_stale(path: Path, option: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise GemmaEdgeError(f"{path}: exists and is not a socket; move it away, or give another {option}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except OSError as cause:
            if cause.errno != errno.ECONNREFUSED:
                raise GemmaEdgeError(
                    f"{path}: cannot tell whether it is in use ({cause}); give another {option}"
                ) from cause
            path.unlink()
            return
    raise GemmaEdgeError(f"{path}: another program listens here; stop it, or give another {option}")
