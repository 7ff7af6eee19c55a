"""The summary that needs no model: computed from the window, in plain sentences, true by construction."""

from __future__ import annotations

from .facts import expected_anomalies, expected_severity
from .prompt import Anomaly, Summary
from .window import Excursion, SensorStats, Window, clock, number


def plain_summary(window: Window) -> Summary:
    """What `facts.untrue` finds nothing wrong with, for any window."""
    anomalies: list[Anomaly] = []
    told: list[str] = []
    actions: list[str] = []
    for sensor in window.sensors:
        name = f"'{sensor.name}'"
        for excursion in sensor.excursions:
            span = _span(window, excursion)
            worst, limit = _with_unit(sensor, excursion.worst), _with_unit(sensor, excursion.limit)
            anomalies.append(Anomaly(sensor.name, excursion.kind, f"worst {worst}, limit {limit}, {span}"))
            verb = "has been" if excursion.last_s is None else "was"
            told.append(f"{name} {verb} {excursion.kind} its limit of {limit} {span}, at worst {worst}.")
            actions.append(f"Check {name}: {excursion.kind} its limit.")
        if (sensor.name, "silent") in expected_anomalies(window):
            quiet = "no readings"
            if sensor.silent_since_s is not None:
                quiet += f" since {clock(window, sensor.silent_since_s)}"
            anomalies.append(Anomaly(sensor.name, "silent", quiet))
            told.append(f"{name} sent {quiet}.")
            actions.append(f"Check power and connection of {name}.")
    return Summary(
        plain_title(window),
        " ".join([_head(window), *told]),
        expected_severity(window),
        tuple(anomalies),
        tuple(actions),
    )


def plain_title(window: Window) -> str:
    """The site and how many things were wrong."""
    wrong = len(expected_anomalies(window))
    return f"{window.site}: " + (
        "all normal" if not wrong else "1 anomaly" if wrong == 1 else f"{wrong} anomalies"
    )


def _head(window: Window) -> str:
    count = len(window.sensors)
    span = f"from {clock(window, window.start_s)} to {clock(window, window.end_s)}"
    return f"{count} {'sensor' if count == 1 else 'sensors'} {span}." + (
        "" if expected_anomalies(window) else " All readings are normal."
    )


def _span(window: Window, excursion: Excursion) -> str:
    first = clock(window, excursion.first_s)
    span = (
        f"since {first}" if excursion.last_s is None else f"from {first} to {clock(window, excursion.last_s)}"
    )
    return span + (f" in {excursion.times} spans" if excursion.times > 1 else "")


def _with_unit(sensor: SensorStats, value: float) -> str:
    return number(sensor, value) + (f" {sensor.unit}" if sensor.unit else "")
