"""The MQTT broker that an example's YAML names: `broker` and `password_file`."""

from __future__ import annotations

from pathlib import Path

from ..runtime.errors import ConfigError
from ..runtime.transports.mqtt_address import BrokerAddress, parse_broker_url


def broker_of(url: str, password_file: str | None) -> BrokerAddress:
    """The first line of `password_file` stands in for a password that the URL lacks. Raises ConfigError."""
    password = None
    if password_file is not None:
        try:
            password = Path(password_file).read_text(encoding="utf-8").split("\n")[0].strip()
        except OSError as cause:
            raise ConfigError(f"password_file: {password_file} cannot be read ({cause.strerror})") from cause
    try:
        return parse_broker_url(url, password=password)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--mqtt: ", "broker: ")) from error
