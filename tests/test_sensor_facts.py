"""The check that a summary is true: true ones pass, however they are written; false ones do not."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import msgspec
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gemma_edge.examples.nano_model.windows import random_window, reference_summary
from gemma_edge.examples.sensor_summary.facts import _Facts, expected_severity, untrue
from gemma_edge.examples.sensor_summary.numerals import canonical_unit, number_meanings, plain_form, tokens
from gemma_edge.examples.sensor_summary.plain import plain_summary
from gemma_edge.examples.sensor_summary.prompt import Anomaly, Summary
from gemma_edge.examples.sensor_summary.window import Excursion, SensorStats, Window, number, render_window

START_S = datetime(2026, 3, 14, 6, tzinfo=UTC).timestamp()
seeds = st.integers(0, 1_000_000)


def at(hour: int, minute: int = 0) -> float:
    return START_S + (hour - 6) * 3600 + minute * 60


def above(limit: float, worst: float, first: float, last: float | None, times: int = 1) -> Excursion:
    return Excursion("above", limit, worst, first, last, times)


S = SensorStats
WINDOW = Window(
    "greenhouse-north",
    at(6),
    at(12),
    (
        S("bench-3/air_temperature", "air temperature", "°C", 1, 72, 12.4, 37.9, 24.1, 33.0, 1.2, 10.0, 32.0,
          (above(32.0, 37.9, at(10, 40), None),)),
        S("bench-4/air_temperature", "air temperature", "°C", 1, 72, -2.1, 18.0, 9.5, 17.2, 0.0, -5.0, 32.0),
        S("bench-4/humidity", "humidity", "%", 0, 70, 41, 77, 60, 45, -5.0, 30, 85),
        S("tank/level", "tank level", "%", 1, 36, 12.0, 60.0, 30.1, 55.0, -0.4, 20.0, None,
          (Excursion("below", 20.0, 12.0, at(8, 10), at(9, 20), 3),)),
        S("roof/pressure", "air pressure", "hPa", 1, 36, 1001.2, 1013.2, 1009.0, 1013.2, 0.0),
        S("shed/co2", "CO2", "ppm", 0, 20, 450, 1450, 800, 900, 0.0, None, 1500, (), at(7, 55)),
    ),
    UTC,
)  # fmt: skip
LONG = Window(
    "house 12",
    at(0),
    at(72),
    (
        S("hall/temp", "temperature", "°C", 1, 500, 14.0, 31.0, 20.5, 21.0, 0.0, 15.0, 30.0,
          (above(30.0, 31.0, at(37), at(39)),)),
    ),
    UTC,
)  # fmt: skip


def problems(text: str, window: Window = WINDOW) -> list[str]:
    return list(_Facts(window, []).check_texts(text))


@pytest.mark.parametrize(
    "text",
    [
        # names, whole and shortened
        "bench-3/air_temperature reached 37.9°C at 10:40.",
        "**bench-3/air_temperature** (37.9 °C) exceeded the limit of `32.0`.",
        "tank/level: check for a leak.",
        "'tank/level' fell to 12.0 %, and 'Tank' is 'low'.",
        "The \"humidity\" of 'bench-4/humidity' is normal, isn't it, and so is that of bench-4's air.",
        "bench-3 air temperature, 37.9 °C, is too high.",
        "The temperature on Bench 3 has been above 32 °C since 10:40, peaking at 37.9 °C.",
        "Temperature rose from 12.4 to 37.9 at bench-3, while the tank fell to 12.0 %.",
        "The CO2 sensor in the shed stopped reporting.",
        "1. Inspect the vent of bench-3.",
        "greenhouse-north: 3 anomalies",
        # numbers, however written
        "bench-4/air_temperature fell to −2.1 °C.",
        "bench-4/air_temperature fell to –2.1 °C.",
        "bench-4/air_temperature fell to minus 2.1 degrees Celsius.",
        "bench-4/air_temperature: -2.1–18.0 °C.",
        "bench-4/air_temperature ranged from -2.1 to 18 °C (mean 9.5).",
        "bench-4/air_temperature fell to -2,1 °C",
        "roof/pressure is 1,013.2 hPa.",
        "roof/pressure is 1.013,2 hPa.",
        "roof/pressure is 1\u202f013.2 hPa.",
        "roof/pressure was between 1001.2–1013.2 hPa.",
        "bench-4/humidity: 41–77%, average 60 percent.",
        "bench-4/humidity averaged 60 %RH and is falling 5 %/h.",
        "bench-3/air_temperature reached ３７.９ ℃.",
        # roles
        "The minimum and maximum of bench-4/air_temperature were -2.1 and 18.0.",
        "bench-3/air_temperature exceeded its maximum of 32.0 °C.",
        "shed/co2 last read 900 ppm; it was 1,450 ppm at most.",
        "tank/level is falling by 0.4 per hour.",
        "tank/level is falling at a rate of 0.4 %/h.",
        # counts
        "3 of 6 sensors show anomalies.",
        "There are three anomalies on 6 sensors.",
        "2 temperature sensors are present.",
        "Two sensors broke a limit, one is silent.",
        "72 readings came from bench-3/air_temperature.",
        "tank/level was below its limit of 20.0 % from 08:10 to 09:20 in 3 spans, at worst 12.0 %.",
        "tank/level was below its limit three times.",
        # times
        "tank/level was below its limit between 8:10 am and 9:20 a.m.",
        "shed/co2 has been silent since 07:55.",
        "No data from shed/co2 since 7:55.",
        "Over the 6-hour window, 3 anomalies were found.",
        "The readings from 06:00 to noon.",
        # phrases
        "All other sensors are normal.",
        "No sensor besides shed/co2 is silent.",
        "bench-4/air_temperature stayed below its upper limit of 32.0 °C.",
        "bench-4/air_temperature and bench-4/humidity are normal. It is steady.",
        "bench-3/air_temperature is still above its limit.",
        "tank/level recovered at 09:20.",
        "bench-4/air_temperature dropped below zero.",
        "Not all sensors are normal.",
        "bench-4/humidity shows no anomalies.",
        "Bench 4 had no issues.",
        "All readings of bench-4/humidity are normal.",
        "All other sensors operate normally.",
        "tank/level returned to normal conditions.",
        "Check heating/cooling and/or ventilation at bench-3/air_temperature.",
    ],
)  # fmt: skip
def test_true_sentences_pass(text: str) -> None:
    assert problems(text) == []


@pytest.mark.parametrize(
    "text",
    [
        # names
        "bench-9/air_temperature reached 37.9°C.",
        "bench9 reached 37.9.",
        "Bench 9 reached 37.9 °C.",
        "bench_33 is out.",
        "T-17 is offline.",
        "bench-west-12 is hot.",
        "'attic' is silent since 07:55.",
        "The `attic` is fine.",
        "“attic” is fine.",
        "attic/temperature is normal.",
        # numbers, however written
        "bench-3/air_temperature reached 37.8°C at 10:40.",
        "bench-4/air_temperature reached 37.9°C.",
        "bench-4/air_temperature fell to 2.1 °C.",
        "bench-4/air_temperature fell to −2,2 °C.",
        "roof/pressure is 1,013 hPa.",
        "roof/pressure is 1.013 hPa.",
        "bench-3/air_temperature reached 37.9e2.",
        "bench-3/air_temperature reached ３７.８ °C.",
        "bench-3/air_temperature reached 3\u200b8 °C.",
        "tank/level fell to 12½ %.",
        "tank/level fell to 12.0² %.",
        "The tank fell to thirteen percent.",
        "Half of the sensors failed.",
        "The temperature rose by 25.5 °C.",
        "12.4x more.",
        "bench-4/air_temperature was normal. It reached 37.9 °C.",
        # units
        "roof/pressure is 1013.2 kPa.",
        "bench-3/air_temperature reached 37.9°F.",
        "bench-3/air_temperature reached 37.9 %.",
        "tank/level averaged 30.1 °C.",
        # roles
        "bench-3/air_temperature: minimum 37.9.",
        "bench-3/air_temperature averaged 37.9 °C.",
        "bench-3/air_temperature: last reading 37.9.",
        "bench-3/air_temperature above the limit of 37.9.",
        "bench-3/air_temperature rising 1.2 °C per day.",
        "bench-3/air_temperature rising 37.9/h.",
        # counts
        "5 sensors show anomalies.",
        "There are four anomalies.",
        "8 sensors in total.",
        "12 sensors are silent.",
        "tank/level was below its limit five times.",
        "tank/level was below its limit in 4 spans.",
        "The tank/level sensor sent 72 readings.",
        # times
        "tank/level has been below its limit since 08:10.",
        "shed/co2 has been silent since 07:54.",
        "shed/co2 has been silent for 2 hours.",
        "bench-3/air_temperature was high at 10:40 PM.",
        "bench-3/air_temperature exceeded its limit at 10:41.",
        "bench-3/air_temperature exceeded its limit at 10:40:30.",
        "Around midnight bench-3/air_temperature rose.",
        "On 2026-03-14 the tank fell.",
        "On March 14 the tank fell.",
        "Check within 24 hours.",
        # phrases
        "bench-3/air_temperature is falling 1.2/h.",
        "bench-4/air_temperature is rising.",
        "tank/level is steady.",
        "tank/level is still below its limit.",
        "bench-4/humidity is silent.",
        "bench-4/humidity sent no readings.",
        "All sensors are normal.",
        "All 6 sensors are within limits.",
        "Everything is normal.",
        "No anomalies.",
        "No anomalies were found.",
        "greenhouse-north: normal",
        "Normal operation at greenhouse-north.",
        "All sensors are normal, bench-4/humidity too.",
        "tank/level shows no anomalies.",
        "60 % of the readings were high.",
        "bench-3/air_temperature is normal.",
        "bench-4/air_temperature exceeded its limit.",
        "bench-4/humidity was below its limit.",
        "bench-3/air_temperature recovered.",
    ],
)  # fmt: skip
def test_false_sentences_do_not(text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize(
    ("text", "true"),
    [
        ("hall/temp was above its limit from 03-15 13:00 to 03-15 15:00.", True),
        ("hall/temp was above its limit on 03-15.", True),
        ("hall/temp was above its limit on March 15 from 13:00 to 15:00.", True),
        ("hall/temp was above its limit on the 15th of March.", True),
        ("House 12 was hot, 31.0 °C.", True),
        ("Over the 3-day window the mean was 20.5.", True),
        ("hall/temp was above its limit from 03-16 13:00.", False),
        ("hall/temp was above its limit on March 16.", False),
        ("hall/temp was above its limit on 03-18.", False),
        ("hall/temp was hot for 2 days.", False),
        ("hall/temp reached 12.", False),
    ],
)
def test_dates_in_long_windows(text: str, true: bool) -> None:
    assert (problems(text, LONG) == []) is true


@given(seeds, st.booleans())
@settings(max_examples=150, deadline=None)
def test_computed_and_taught_summaries_are_true(seed: int, held_out: bool) -> None:
    window = random_window(random.Random(seed), held_out=held_out)
    assert untrue(window, plain_summary(window)) == []
    assert untrue(window, reference_summary(window)) == []


def _strange_number(rng: random.Random, written: str) -> str:
    """The same number with one digit changed."""
    digits = [i for i, c in enumerate(written) if c.isdigit()]
    spot = rng.choice(digits)
    other = rng.choice([c for c in "0123456789" if c != written[spot]])
    return written[:spot] + other + written[spot + 1 :]


@given(seeds)
@settings(max_examples=200, deadline=None)
def test_one_wrong_digit_is_found(seed: int) -> None:
    rng = random.Random(seed)
    window = random_window(rng)
    summary = reference_summary(window)
    names = re.compile("|".join(re.escape(n) for n in [window.site, *(s.name for s in window.sensors)]))
    spots = [
        m
        for m in re.finditer(r"(?<![\w.:-])-?\d+(?:\.\d+)?(?![\w:/-])", summary.summary)
        if not any(n.start() <= m.start() < n.end() for n in names.finditer(summary.summary))
    ]
    assume(spots)
    spot = rng.choice(spots)
    wrong = _strange_number(rng, spot[0])
    known = {Decimal(n) for n in re.findall(r"(?<![\d.])-?\d+(?:\.\d+)?", render_window(window))}
    assume(Decimal(wrong) not in known and Decimal(wrong) > len(window.sensors))
    text = summary.summary[: spot.start()] + wrong + summary.summary[spot.end() :]
    assert untrue(window, msgspec.structs.replace(summary, summary=text)), (spot[0], wrong)


@given(seeds)
@settings(max_examples=200, deadline=None)
def test_a_wrong_time_is_found(seed: int) -> None:
    rng = random.Random(seed)
    window = random_window(rng)
    summary = reference_summary(window)
    spots = list(re.finditer(r"\b\d\d:\d\d\b", summary.summary))
    spot = rng.choice(spots)
    wrong = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    assume(wrong not in render_window(window))
    text = summary.summary[: spot.start()] + wrong + summary.summary[spot.end() :]
    assert untrue(window, msgspec.structs.replace(summary, summary=text))


@given(seeds)
@settings(max_examples=200, deadline=None)
def test_a_number_of_another_sensor_is_found(seed: int) -> None:
    rng = random.Random(seed)
    window = random_window(rng)
    assume(len(window.sensors) > 1)
    one, other = rng.sample(window.sensors, 2)
    assume(other.count and one.count)
    foreign = number(other, other.maximum or 0.0)
    own = re.findall(r"-?\d+(?:\.\d+)?", render_window(replace(window, sensors=(one,))))
    assume(Decimal(foreign) not in {Decimal(n) for n in own} and Decimal(foreign) > 50)
    assert problems(f"{one.name} reached {foreign}.", window)
    assert not problems(f"{other.name} reached {foreign}.", window)


@given(seeds)
@example(13516)
@settings(max_examples=100, deadline=None)
def test_a_wrong_name_is_found(seed: int) -> None:
    rng = random.Random(seed)
    window = random_window(rng)
    summary = reference_summary(window)
    named = [s.name for s in window.sensors if s.name in summary.summary and re.search(r"\d", s.name)]
    assume(named)
    name = rng.choice(named)
    wrong = re.sub(r"\d+", lambda m: str(int(m[0]) + 41), name)
    assume(not any(wrong.endswith(s.name) or s.name in wrong for s in window.sensors))
    text = re.sub(rf"(?<![\w/-]){re.escape(name)}(?![\w/-])", wrong, summary.summary)
    assume(text != summary.summary)
    assert untrue(window, msgspec.structs.replace(summary, summary=text)), wrong


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_severity_and_anomalies_must_be_exact(seed: int) -> None:
    rng = random.Random(seed)
    window = random_window(rng)
    summary = plain_summary(window)
    wrong = [s for s in range(3) if s != summary.severity]
    assert untrue(window, msgspec.structs.replace(summary, severity=rng.choice(wrong)))
    if summary.anomalies:
        fewer = list(summary.anomalies)
        fewer.pop(rng.randrange(len(fewer)))
        assert any(
            "missing" in p for p in untrue(window, msgspec.structs.replace(summary, anomalies=tuple(fewer)))
        )
        twice = (*summary.anomalies, summary.anomalies[0])
        assert any("twice" in p for p in untrue(window, msgspec.structs.replace(summary, anomalies=twice)))
    more = (*summary.anomalies, Anomaly("no/such", "above"))
    assert any(
        "not in the data" in p for p in untrue(window, msgspec.structs.replace(summary, anomalies=more))
    )


@given(st.text(max_size=300), st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_is_judged_without_an_error(body: str, detail: str) -> None:
    anomaly = Anomaly("bench-3/air_temperature", "above", detail)
    untrue(WINDOW, Summary(detail or "x", body, expected_severity(WINDOW), (anomaly,), (detail,)))


@given(st.decimals(-99_999, 99_999, places=2))
@settings(deadline=None)
def test_a_number_is_read_however_it_is_written(value: Decimal) -> None:
    english, german = f"{value:,.2f}", f"{value:,.2f}".translate(str.maketrans(",.", ".,"))
    swiss = english.replace(",", "'")
    for written in (f"{value}", english, german, swiss, f"{value}".replace("-", "−")):
        assert value in number_meanings(plain_form(f" {written}").strip()), written
    spaced = f"{value:,.2f}".replace(",", "\u202f")
    (token,) = tokens(plain_form(spaced), [])
    assert value in token.values


@pytest.mark.parametrize(
    ("written", "meanings"),
    [("1,013", {"1013", "1.013"}), ("1.013", {"1.013"}), ("1,013,200", {"1013200"}), ("10,32", {"10.32"}),
     ("1.2.3", set()), ("10.32,5", set()), ("+3", {"3"})],
)  # fmt: skip
def test_what_digits_may_mean(written: str, meanings: set[str]) -> None:
    assert number_meanings(written) == {Decimal(m) for m in meanings}


def test_units_that_mean_the_same() -> None:
    assert canonical_unit("degrees Celsius") == canonical_unit("°C") == canonical_unit("C")
    assert canonical_unit("%RH") == canonical_unit("percent")
    assert canonical_unit("mW") != canonical_unit("MW")
    assert canonical_unit("KPA") == canonical_unit("kPa")


def test_a_name_within_a_name_is_not_named() -> None:
    window = replace(
        WINDOW,
        sensors=(
            S("a/t1", "temperature", "°C", 1, 9, 1.5, 2.5, 2.0, 2.0, 0.0),
            S("a/t10", "temperature", "°C", 1, 9, 11.5, 12.5, 12.0, 12.0, 0.0),
        ),
    )
    assert problems("a/t10 reached 12.5.", window) == []
    assert problems("a/t1 reached 12.5.", window)
    assert problems("a/t10 reached 2.5.", window)
    assert problems("a/t1, a/t10: 12.5.", window) == []


def test_a_name_that_is_a_number_is_named_in_quotes_or_brackets() -> None:
    excursion = above(60.0, 80.0, at(8), at(9, 35))
    sensors = (
        S("boiler", "temperature", "°C", 1, 200, 21, 35, 30, 30, 0.0, None, 40, (excursion,)),
        S("35", "weight", "kg", 1, 90, 148, 716, 567, 479, 0.0),
    )
    window = replace(WINDOW, sensors=sensors)
    assert (
        problems("'boiler' was above its limit of 60 °C from 08:00 to 09:35, at worst 80 °C.", window) == []
    )
    assert problems("'boiler' was above its limit of 60 °C from 08:00 to 09:36.", window)
    assert problems("[35] The mean was 567 kg.", window) == [] == problems("'35' averaged 567 kg.", window)
    assert problems("[boiler to 35] All but 'boiler' are normal.", window) == []
    assert problems("'35' averaged 30 °C.", window)
    assert problems("'boiler' averaged 35 °C.", window), "the number, which no name hides"


def test_units_and_quantities_with_digits_are_no_values() -> None:
    window = replace(
        WINDOW,
        sensors=(
            S("air/pm", "PM2.5", "µg/m3", 0, 60, 5, 40, 20, 30, 0.0),
            S("p", "pH", "", 1, 9, 6, 7, 6.5, 6.6),
        ),
    )
    assert problems("air/pm averaged 20 µg/m³ of PM2.5, at most 40 μg/m3.", window) == []
    assert problems("air/pm averaged 3 µg/m3.", window)
    assert problems("air/pm fell to 2.5.", window)
    assert problems("The pH was 6.5 on average.", window) == []


def test_the_sites_own_digits_are_no_values() -> None:
    window = replace(WINDOW, site="house 12")
    assert problems("House 12 has 3 anomalies.", window) == []
    dated = replace(WINDOW, site="Jun 21")
    assert problems("Jun 21: 3 anomalies.", dated) == [] == problems("Jun 21 has 3 anomalies.", dated)
    assert problems("bench-4/humidity fell to 12 %.", window)


def test_what_is_measured_names_no_place() -> None:
    """ "Pump state" is about the sensor that measures it, not about another one at a place called "pump"."""
    excursion = above(0.0, 1.0, at(8), at(9))
    window = replace(
        WINDOW,
        sensors=(
            S("pump/flow", "flow rate", "l/min", 1, 95, 26.3, 28.6, 27.2, 26.6, 0.0, None, 47.7),
            S("pump_running", "pump state", "", 0, 144, 0, 1, 0, 0, 0.0, None, 0, (excursion,)),
        ),
    )
    assert problems("Pump state above limit", window) == []
    assert problems("The pump is above its limit", window)
    assert problems("Pump flow is above its limit", window)
    # At its own place the word still names the sensor.
    assert problems("Tank level silent")
    assert problems("Tank level below limit") == []
