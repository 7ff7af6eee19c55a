"""Makes greenhouse-day.jsonl.gz: one recorded day of a greenhouse, simulated minute by minute with real
faults.

`python -m gemma_edge.examples.sensor_summary.make_log [OUT]` writes the committed file again, byte for byte
as text. The faults: the heater of bench 1 fails in the night; the vent over bench 2 sticks in the afternoon;
the seedlings' sensor dies of its battery; the tank leaks; the humidity sensor is noisy. And what any real log
has: a sensor that says "unavailable", an empty field, the bridge's own messages.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

START = datetime(2026, 3, 14, tzinfo=ZoneInfo("Europe/Madrid"))
MINUTES = 24 * 60
SEED = 20260314
HEATER_OFF = (1 * 60 + 35, 4 * 60 + 5)  # minutes of the day
VENT_STUCK = (13 * 60 + 20, 18 * 60 + 35)
LEAK = (12 * 60 + 40, 19 * 60 + 50)
REFILL = (20 * 60 + 5, 20 * 60 + 25)
BATTERY_DEAD = 14 * 60 + 36
IRRIGATION = (7 * 60 + 30, 13 * 60)
DOOR = (
    7 * 60 + 12,
    7 * 60 + 16,
    9 * 60 + 40,
    9 * 60 + 43,
    16 * 60 + 5,
    16 * 60 + 9,
    19 * 60 + 2,
    19 * 60 + 11,
)


@dataclass
class State:
    """The greenhouse at one minute."""

    bench_1_c: float = 14.0
    bench_2_c: float = 14.3
    heater_1: bool = True
    heater_2: bool = True
    humidity: float = 84.0
    soil: float = 47.0
    tank: float = 64.0
    tank_c: float = 12.4
    cloud: float = 0.2
    light_lux: float = 0.0


def outside_c(minute: int) -> float:
    """Coldest at six, warmest at four in the afternoon."""
    return 9.0 - 6.0 * math.cos((minute / 60 - 4.5) / 24 * 2 * math.pi)


def sun(minute: int) -> float:
    """Clear-sky light between 0 and 1, from half past seven to seven."""
    phase = (minute - 450) / (1140 - 450)
    return math.sin(phase * math.pi) if 0 < phase < 1 else 0.0


def simulate(rng: random.Random) -> Iterator[tuple[int, State]]:
    """The state at each minute, from 0 to 1440."""
    state = State()
    for minute in range(MINUTES + 1):
        yield minute, state
        state.cloud = min(0.75, max(0.0, state.cloud + rng.gauss(0.0, 0.035) + (0.12 - state.cloud) * 0.03))
        light = sun(minute) * (1 - state.cloud)
        state.light_lux = 62_000 * light
        heater_works = not HEATER_OFF[0] <= minute < HEATER_OFF[1]
        state.heater_1 = _thermostat(state.heater_1, state.bench_1_c) and heater_works
        state.heater_2 = _thermostat(state.heater_2, state.bench_2_c)
        vent_1 = min(1.0, max(0.0, (state.bench_1_c - 22.0) / 5.0))
        vent_2 = min(1.0, max(0.0, (state.bench_2_c - 22.0) / 5.0))
        if VENT_STUCK[0] <= minute < VENT_STUCK[1]:
            vent_2 = 0.0
        out = outside_c(minute)
        state.bench_1_c += _warming(state.bench_1_c, out, light, vent_1, state.heater_1) + rng.gauss(0, 0.02)
        state.bench_2_c += _warming(state.bench_2_c, out, light, vent_2, state.heater_2) + rng.gauss(0, 0.02)
        aim = 90.0 - 1.7 * (state.bench_1_c - 12.0)
        state.humidity += (aim - state.humidity) * 0.02
        state.soil += (
            22.0 / 60 if any(at <= minute < at + 25 for at in IRRIGATION) else -(0.25 + 0.9 * light) / 60
        )
        state.tank -= 5.0 / 25 if any(at <= minute < at + 25 for at in IRRIGATION) else 0.0
        state.tank -= 8.5 / 60 if LEAK[0] <= minute < LEAK[1] else 0.0
        state.tank += 4.0 if REFILL[0] <= minute < REFILL[1] else 0.0
        state.tank = min(96.0, max(3.0, state.tank))
        state.tank_c += (0.5 * (out + state.bench_1_c) - state.tank_c) / 700


def _thermostat(on: bool, celsius: float) -> bool:
    return celsius < 13.2 or (on and celsius < 15.0)


def _warming(celsius: float, out: float, light: float, vent: float, heater: bool) -> float:
    """Degrees in one minute: leaks and vents to the outside, sun, heater."""
    return (out - celsius) * (0.006 + 0.028 * vent) + 0.2 * light + (0.115 if heater else 0.0)


def messages(seed: int = SEED) -> list[tuple[datetime, str, str]]:
    """(time, topic, payload) of the whole day, in order."""
    rng = random.Random(seed)
    found: list[tuple[datetime, str, str]] = [(START, "zigbee2mqtt/bridge/state", '{"state":"online"}')]

    def put(minute: int, second: int, topic: str, payload: str) -> None:
        time = START + timedelta(minutes=minute, seconds=second)
        if time <= START + timedelta(minutes=MINUTES):
            found.append((time, topic, payload))

    battery = 31.0
    for minute, state in simulate(rng):
        if minute % 5 == 0:
            put(
                minute, 4, "greenhouse/bench-1/air_temperature", f"{state.bench_1_c + rng.gauss(0, 0.06):.2f}"
            )
            put(
                minute, 9, "greenhouse/bench-2/air_temperature", f"{state.bench_2_c + rng.gauss(0, 0.06):.2f}"
            )
            humidity = min(99.0, state.humidity + rng.gauss(0, 1.9))
            # The sensor restarts at twenty past eleven.
            percent = "unavailable" if minute == 11 * 60 + 20 else round(humidity, 1)
            put(
                minute,
                17,
                "greenhouse/bench-1/climate",
                json.dumps({"air": {"humidity": percent}, "rssi": -61}),
            )
            lux = max(0.0, state.light_lux * rng.gauss(1, 0.02))
            put(minute, 22, "greenhouse/outside/light", f"{lux:.0f}")
        if minute % 10 == 3 and minute < BATTERY_DEAD:
            battery -= 0.2 if minute < 600 else 0.4
            seen = START + timedelta(minutes=minute, seconds=30)
            body: dict[str, Any] = {
                "battery": None if minute == 63 else max(0, round(battery)),
                "last_seen": seen.isoformat(timespec="seconds"),
                "linkquality": rng.randint(70, 110),
                "soil_moisture": round(state.soil + rng.gauss(0, 0.25), 1),
            }
            put(minute, 31, "zigbee2mqtt/seedlings", json.dumps(body))
        if minute % 10 == 6:
            time = START + timedelta(minutes=minute, seconds=40)
            body = {
                "Time": time.strftime("%Y-%m-%dT%H:%M:%S"),
                "DS18B20": {"Id": "0316A2799F3C", "Temperature": round(state.tank_c + rng.gauss(0, 0.04), 1)},
                "VL53L0X": {"Level": round(state.tank + rng.gauss(0, 0.3), 1)},
                "TempUnit": "C",
            }
            put(minute, 40, "tele/tank/SENSOR", json.dumps(body))
        if minute in DOOR:
            put(minute, 12, "greenhouse/door/state", "open" if DOOR.index(minute) % 2 == 0 else "closed")
        if minute == BATTERY_DEAD + 25:
            put(minute, 0, "zigbee2mqtt/seedlings/availability", '{"state":"offline"}')
    found.append((START + timedelta(minutes=MINUTES), "zigbee2mqtt/bridge/state", '{"state":"online"}'))
    return sorted(found, key=lambda message: message[0])


def write_log(path: Path, seed: int = SEED) -> int:
    """Write the log; its number of messages."""
    day = messages(seed)
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=9, mtime=0) as file,
    ):
        for time, topic, payload in day:
            line = {"time": time.isoformat(timespec="seconds"), "topic": topic, "payload": payload}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    return len(day)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the recorded day of the greenhouse.")
    parser.add_argument(
        "out", nargs="?", type=Path, default=Path(__file__).with_name("greenhouse-day.jsonl.gz")
    )
    out = parser.parse_args().out
    print(f"{out}: {write_log(out)} messages, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
