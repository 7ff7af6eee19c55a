"""Random windows of sensor readings, the summary that a good reader would write, and questions about them.

The windows come as statistics, as the sensor-summary application computes them; nothing is simulated second
by second. `held_out=True` draws sites and names from words that training never uses, and values from ranges
that training leaves out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from ..sensor_summary.facts import expected_anomalies, expected_severity
from ..sensor_summary.prompt import Anomaly, Summary
from ..sensor_summary.window import (
    Excursion,
    SensorStats,
    Window,
    clock,
    number,
    render_trend,
)
from .words import (
    GENERIC,
    PLACES,
    QUANTITIES,
    SILENT_ACTION,
    STATES,
    Quantity,
    invented_word,
    place,
    site,
)

HOUR_S = 3600
# Ranges of quantities are scaled by a random factor; these factors are left to the held-out windows.
HELD_OUT_SCALE = (1.08, 1.55)


def random_window(rng: random.Random, *, held_out: bool = False, max_sensors: int = 8) -> Window:
    """One window: a site, a time span, one to `max_sensors` sensors, some of them with faults."""
    hours = rng.choice([1, 1, 2, 3, 4, 6, 6, 6, 8, 12, 12, 24, 24, 48, 72, 168])
    start = datetime(rng.randint(2020, 2030), rng.randint(1, 12), rng.randint(1, 28), tzinfo=UTC)
    start_s = (
        start.timestamp() + rng.randrange(0, 24) * HOUR_S + rng.choice([0, 0, 0, 15, 30, 45, 7, 52]) * 60
    )
    end_s = start_s + hours * HOUR_S
    count = min(max_sensors, 1 + int(rng.triangular(0, max_sensors, 4)))
    fault_rate = rng.choice([0.0, 0.0, 0.12, 0.25, 0.45])
    shared = [place(rng, held_out) for _ in range(3)]
    style = rng.randrange(7)
    sensors: dict[str, SensorStats] = {}
    while len(sensors) < count:
        quantity = rng.choice(STATES if rng.random() < 0.06 else QUANTITIES)
        name = _sensor_name(
            rng, quantity, style if rng.random() < 0.8 else rng.randrange(7), shared, held_out
        )
        if name not in sensors:
            sensors[name] = _sensor(rng, name, quantity, start_s, end_s, fault_rate, held_out)
    return Window(site(rng, held_out), start_s, end_s, tuple(sensors.values()), UTC)


def speakable_window(rng: random.Random) -> Window:
    """One to four sensors whose names are words that can be said: "bench-3/air_temperature"."""
    known = {name for quantity in QUANTITIES for name in quantity.names if re.fullmatch("[a-z ]+", name)}
    window = random_window(rng, max_sensors=4)
    sensors: dict[str, SensorStats] = {}
    for sensor in window.sensors:
        spot = rng.choice(PLACES) + rng.choice(["", "", f"-{rng.randint(1, 20)}"])
        what = sensor.quantity if sensor.quantity in known else rng.choice(sorted(known))
        name = f"{spot}/{what.replace(' ', '_')}"
        sensors[name] = replace(sensor, name=name)
    return replace(window, sensors=tuple(sensors.values()))


def _sensor_name(
    rng: random.Random, quantity: Quantity, style: int, shared: list[str], held_out: bool
) -> str:
    long = rng.choice(quantity.names).replace(" ", rng.choice(["_", "_", "-"])).lower()
    short = rng.choice(quantity.short or quantity.names).replace(" ", "_")
    spot = rng.choice(shared) if rng.random() < 0.5 else place(rng, held_out)
    match style:
        case 0 | 1:
            return f"{spot}/{long}"
        case 2:
            return f"{spot}/{short}"
        case 3:
            return f"{spot}_{long}"
        case 4:
            return f"{rng.choice(shared)}/{place(rng, held_out)}/{short}"
        case 5:
            return f"{spot}-{short}-{rng.randint(1, 30)}"
        case _:
            return spot


def _scale(rng: random.Random, held_out: bool) -> float:
    low, high = HELD_OUT_SCALE
    if held_out:
        return rng.uniform(low, high)
    return rng.choice([rng.uniform(0.25, low), rng.uniform(0.6, low), rng.uniform(high, 4.0), 1.0])


def _sensor(
    rng: random.Random,
    name: str,
    quantity: Quantity,
    start_s: float,
    end_s: float,
    fault_rate: float,
    held_out: bool,
) -> SensorStats:
    unit, low, high, decimals = rng.choice(quantity.units)
    if quantity in STATES:
        return _state_sensor(rng, name, rng.choice(quantity.names), decimals, start_s, end_s, fault_rate)
    scale = _scale(rng, held_out)
    low, high = low * scale, high * scale
    span = high - low
    step = 10.0**-decimals
    names = quantity.names if rng.random() < 0.93 else (invented_word(rng),)

    has_low, has_high = rng.choice([(True, True)] * 3 + [(True, False), (False, True), (False, False)])
    faults = rng.random() < fault_rate
    silent = faults and rng.random() < 0.3
    above = has_high and faults and (not silent or rng.random() < 0.1) and rng.random() < 0.55
    below = has_low and faults and (not silent or rng.random() < 0.1) and (not above or rng.random() < 0.08)
    empty = silent and not above and not below and rng.random() < 0.25

    limit_low = round(low, decimals) if has_low else None
    limit_high = round(high, decimals) if has_high else None
    if empty:
        return SensorStats(name, rng.choice(names), unit, decimals, 0, low=limit_low, high=limit_high)

    inside_low, inside_high = low + 0.03 * span + step, high - 0.03 * span - step
    a, b = sorted(rng.uniform(inside_low, inside_high) for _ in range(2))
    if rng.random() < 0.5:  # most sensors move little
        middle = (a + b) / 2
        reach = span * rng.uniform(0.0, 0.12)
        a, b = max(inside_low, middle - reach), min(inside_high, middle + reach)
    minimum, maximum = min(a, b), max(a, b)
    beyond = span * rng.choice([0.02, 0.08, 0.2, 0.5]) * rng.uniform(0.5, 1.5) + step
    if above:
        maximum = high + beyond
    if below:
        minimum = low - beyond
    minimum, maximum = round(minimum, decimals), round(maximum, decimals)
    mean = rng.uniform(minimum + 0.2 * (maximum - minimum), maximum - 0.2 * (maximum - minimum))

    last_reading_s = end_s
    silent_since = None
    if silent:
        last_reading_s = _minute(
            rng.uniform(start_s + 0.05 * (end_s - start_s), start_s + 0.9 * (end_s - start_s))
        )
        silent_since = last_reading_s
    excursions: list[Excursion] = []
    still_out = None
    for kind, limit, worst, wanted in (("above", high, maximum, above), ("below", low, minimum, below)):
        if not wanted:
            continue
        first = _minute(rng.uniform(start_s, last_reading_s - 120))
        still = still_out is None and rng.random() < 0.45
        end = None if still else _minute(rng.uniform(first + 60, last_reading_s))
        if still:
            still_out = kind
        times = rng.choice([1, 1, 1, rng.randint(2, 9)])
        excursions.append(Excursion(kind, round(limit, decimals), worst, first, end, times))  # type: ignore[arg-type]
    last = rng.uniform(minimum, maximum)
    if still_out == "above":
        last = rng.uniform(high + step, max(high + step, maximum))
    elif still_out == "below":
        last = rng.uniform(min(low - step, minimum), low - step)
    elif excursions:
        last = rng.uniform(max(minimum, low), min(maximum, high))
    interval_s = rng.choice([10, 30, 60, 60, 300, 300, 600, 900])
    count = max(2, int((last_reading_s - start_s) / interval_s) + rng.randint(-3, 0))
    slope: float | None = rng.choice(
        [0.0, rng.uniform(-1, 1) * (maximum - minimum) * HOUR_S / (end_s - start_s)]
    )
    if not excursions and rng.random() < 0.04:  # too few readings for a trend
        count, slope = rng.randint(1, 2), None
        last = rng.choice([minimum, maximum])
        if count == 1:
            minimum = maximum = mean = last
        else:
            mean = (minimum + maximum) / 2
    return SensorStats(
        name,
        rng.choice(names),
        unit,
        decimals,
        count,
        minimum,
        maximum,
        round(mean, decimals),
        round(last, decimals),
        slope,
        limit_low,
        limit_high,
        tuple(excursions),
        silent_since,
    )


def _state_sensor(
    rng: random.Random,
    name: str,
    quantity: str,
    decimals: int,
    start_s: float,
    end_s: float,
    fault_rate: float,
) -> SensorStats:
    """A sensor of 0 and 1: a contact, a leak, a motor's state. A limit of 0 makes 1 an alarm."""
    limit = rng.choice([None, None, 0.0])
    alarm = limit is not None and rng.random() < fault_rate
    seen_one = alarm or (limit is None and rng.random() < 0.6)
    seen_zero = not seen_one or rng.random() < 0.9
    count = max(3, int((end_s - start_s) / rng.choice([60, 300, 600, 3600])))
    share = rng.uniform(1 / count, 1 - 1 / count) if seen_zero and seen_one else float(seen_one)
    last = float(seen_one and (not seen_zero or rng.random() < 0.5))
    excursions: tuple[Excursion, ...] = ()
    if alarm:
        first = _minute(rng.uniform(start_s, end_s - 120))
        end = None if last else _minute(rng.uniform(first + 60, end_s))
        excursions = (Excursion("above", 0.0, 1.0, first, end, rng.choice([1, 1, 1, rng.randint(2, 9)])),)
    silent = None
    if not alarm and rng.random() < 0.3 * fault_rate:
        silent = _minute(rng.uniform(start_s + 0.05 * (end_s - start_s), start_s + 0.9 * (end_s - start_s)))
    return SensorStats(
        name,
        quantity,
        "",
        decimals,
        count,
        float(not seen_zero),
        float(seen_one),
        round(share, decimals),
        last,
        0.0,
        None,
        limit,
        excursions,
        silent,
    )


def _minute(time_s: float) -> float:
    return time_s - time_s % 60


def reference_summary(window: Window) -> Summary:
    """The summary that the model is taught for `window`."""
    anomalies: list[Anomaly] = []
    titles: list[str] = []
    told: list[str] = []
    actions: list[str] = []
    for sensor in window.sensors:
        above, below = _actions(sensor)
        for excursion in sensor.excursions:
            worst = _with_unit(sensor, excursion.worst)
            anomalies.append(Anomaly(sensor.name, excursion.kind, f"worst {worst}"))
            told.append(_excursion_sentence(window, sensor, excursion))
            titles.append(f"{sensor.quantity} {excursion.kind} limit")
            actions.append(above if excursion.kind == "above" else below)
        if (sensor.name, "silent") in expected_anomalies(window):
            since = sensor.silent_since_s
            when = "no readings" if since is None else f"silent since {clock(window, since)}"
            anomalies.append(Anomaly(sensor.name, "silent", when))
            told.append(f"'{sensor.name}' " + ("sent no readings." if since is None else f"has been {when}."))
            titles.append(f"{sensor.quantity} silent")
            actions.append(SILENT_ACTION)
    if not anomalies:
        titles.append("all normal")
        told.append("All readings are normal.")
        first = window.sensors[0]
        low, high = number(first, first.minimum or 0), _with_unit(first, first.maximum)
        told.append(f"'{first.name}' ranged from {low} to {high}, mean {_with_unit(first, first.mean)}.")
    elif len({anomaly.sensor for anomaly in anomalies}) < len(window.sensors):
        told.append("The other sensors are normal.")
    many = "sensor" if len(window.sensors) == 1 else "sensors"
    head = (
        f"{len(window.sensors)} {many} from {clock(window, window.start_s)} to {clock(window, window.end_s)}."
    )
    title = titles[0] if len(titles) == 1 else f"{titles[0]} and more"
    return Summary(
        title=title[0].upper() + title[1:],
        summary=" ".join([head, *told]),
        severity=expected_severity(window),
        anomalies=tuple(anomalies),
        actions=tuple(dict.fromkeys(actions)),
    )


def _excursion_sentence(window: Window, sensor: SensorStats, excursion: Excursion) -> str:
    first = clock(window, excursion.first_s)
    limit, worst = _with_unit(sensor, excursion.limit), _with_unit(sensor, excursion.worst)
    several = f" in {excursion.times} spans" if excursion.times > 1 else ""
    if excursion.last_s is None:
        verb, when = "has been", f"since {first}"
    else:
        verb, when = "was", f"from {first} to {clock(window, excursion.last_s)}"
    return f"'{sensor.name}' {verb} {excursion.kind} its limit of {limit} {when}{several}, at worst {worst}."


def _actions(sensor: SensorStats) -> tuple[str, str]:
    for quantity in (*QUANTITIES, *STATES):
        if sensor.quantity in quantity.names:
            return quantity.above, quantity.below
    return GENERIC


# --- questions

_ASK = {
    "max": (
        "What was the highest {q} of {s}?",
        "What is the maximum of {s}?",
        "How high did {s} go?",
        "Peak value of {s}?",
        "Tell me the max of {s}.",
    ),
    "min": (
        "What was the lowest {q} of {s}?",
        "What is the minimum of {s}?",
        "How low did {s} go?",
        "Lowest value of {s}?",
        "Tell me the min of {s}.",
    ),
    "mean": (
        "What was the average {q} of {s}?",
        "What is the mean of {s}?",
        "On average, what did {s} read?",
        "Average of {s}?",
    ),
    "last": (
        "What is the latest reading of {s}?",
        "What does {s} read now?",
        "What is the current {q} of {s}?",
        "Last value of {s}?",
        "How is {s} now?",
    ),
    "trend": (
        "Is {s} rising or falling?",
        "What is the trend of {s}?",
        "How is {s} changing?",
        "Which way is {s} going?",
    ),
    "count": ("How many readings came from {s}?", "How often did {s} report?", "Number of readings of {s}?"),
    "limits": ("What are the limits of {s}?", "Which limits does {s} have?", "Allowed range of {s}?"),
    "ok": (
        "Is {s} within its limits?",
        "Is {s} ok?",
        "Was anything wrong with {s}?",
        "Any problem with {s}?",
    ),
}
_ASK_ALL = {
    "silent": ("Which sensors are silent?", "Is any sensor silent?", "Which sensors stopped reporting?"),
    "out": (
        "Which sensors were out of limits?",
        "Which sensors broke a limit?",
        "Was any limit exceeded?",
    ),
    "wrong": ("What is wrong?", "Are there any anomalies?", "Is everything normal?", "Any problems?"),
    "how_many": ("How many sensors are there?", "How many sensors report from this site?"),
    "site": ("Which site is this?", "What is the name of the site?"),
}


def random_question(rng: random.Random, window: Window, *, spoken: bool = False) -> tuple[str, str]:
    """A short question about the window and its answer; `spoken`: with names as one says them."""
    if rng.random() < 0.25:
        topic = rng.choice(list(_ASK_ALL))
        return rng.choice(_ASK_ALL[topic]), _answer_all(topic, window)
    sensor = rng.choice(window.sensors)
    topic = rng.choice(list(_ASK))
    name = sensor.name if rng.random() < 0.5 else f"'{sensor.name}'"
    if spoken:
        name = "the " + re.sub(r"[/_-]", " ", sensor.name)
    question = rng.choice(_ASK[topic]).format(s=name, q=sensor.quantity)
    return question, _ANSWERS[topic](window, sensor)


def _with_unit(sensor: SensorStats, value: float | None) -> str:
    return number(sensor, value or 0.0) + (f" {sensor.unit}" if sensor.unit else "")


def _reading(word: str, field: str) -> Callable[[Window, SensorStats], str]:
    def answer(window: Window, sensor: SensorStats) -> str:
        if not sensor.count:
            return f"'{sensor.name}' sent no readings."
        return f"The {word} of '{sensor.name}' was {_with_unit(sensor, getattr(sensor, field))}."

    return answer


def _trend(window: Window, sensor: SensorStats) -> str:
    if not sensor.count:
        return f"'{sensor.name}' sent no readings."
    if sensor.trend_per_hour is None:
        return f"'{sensor.name}' sent too few readings to tell."
    return f"'{sensor.name}' is {render_trend(sensor)}."


def _limits(window: Window, sensor: SensorStats) -> str:
    if sensor.low is not None and sensor.high is not None:
        low = number(sensor, sensor.low)
        return f"'{sensor.name}' should stay from {low} to {_with_unit(sensor, sensor.high)}."
    if sensor.high is not None:
        return f"'{sensor.name}' should stay at or below {_with_unit(sensor, sensor.high)}."
    if sensor.low is not None:
        return f"'{sensor.name}' should stay at or above {_with_unit(sensor, sensor.low)}."
    return f"'{sensor.name}' has no limits."


def _ok(window: Window, sensor: SensorStats) -> str:
    told = _troubles(window, sensor)
    return f"No: {', and '.join(told)}." if told else f"Yes, '{sensor.name}' is normal."


def _troubles(window: Window, sensor: SensorStats) -> list[str]:
    told = []
    for excursion in sensor.excursions:
        first = clock(window, excursion.first_s)
        if excursion.last_s is None:
            told.append(f"'{sensor.name}' has been {excursion.kind} its limit since {first}")
        else:
            last = clock(window, excursion.last_s)
            told.append(f"'{sensor.name}' was {excursion.kind} its limit from {first} to {last}")
    if sensor.silent_since_s is not None:
        told.append(f"'{sensor.name}' has been silent since {clock(window, sensor.silent_since_s)}")
    elif not sensor.count:
        told.append(f"'{sensor.name}' sent no readings")
    return told


_ANSWERS: dict[str, Callable[[Window, SensorStats], str]] = {
    "max": _reading("maximum", "maximum"),
    "min": _reading("minimum", "minimum"),
    "mean": _reading("mean", "mean"),
    "last": _reading("last reading", "last"),
    "trend": _trend,
    "count": lambda window, sensor: f"'{sensor.name}' sent {sensor.count} readings.",
    "limits": _limits,
    "ok": _ok,
}


def _answer_all(topic: str, window: Window) -> str:
    wrong = expected_anomalies(window)
    if topic == "how_many":
        return f"{len(window.sensors)} sensors." if len(window.sensors) > 1 else "1 sensor."
    if topic == "site":
        return f"This is '{window.site}'."
    if topic == "silent":
        names = [f"'{s.name}'" for s in window.sensors if (s.name, "silent") in wrong]
        return f"Silent: {', '.join(names)}." if names else "No sensor is silent."
    if topic == "out":
        names = [f"'{s.name}'" for s in window.sensors if s.excursions]
        return f"Out of limits: {', '.join(names)}." if names else "All sensors stayed within limits."
    told = [trouble for sensor in window.sensors for trouble in _troubles(window, sensor)]
    return f"{'. '.join(told)}." if told else "Everything is normal."
