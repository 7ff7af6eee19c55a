"""The vocabulary of the corpus: places, quantities, sites. Held-out words never occur in training."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

PLACES = """
bench bed bay hall room attic cellar garage kitchen office lab workshop store dock yard roof barn silo shed
pond tank pump boiler chiller fan duct vent filter valve line press oven kiln mixer mill belt lift tower
rack cabinet server panel inverter meter battery charger turbine well pipe main east west north south upper
lower inner outer front back left right zone area unit block level floor wing gate door window wall stall
pen coop hive field plot row nursery propagation canopy compost reservoir basin sump channel canal quay
berth hold bridge cabin galley deck archive gallery library classroom gym pool sauna lobby atrium corridor
stair elevator parking depot warehouse freezer fridge cooler coldroom display counter bakery brewery winery
dairy cellarage fermenter still vat cask clinic ward pharmacy theatre morgue nursery2 incubator vivarium
aquarium terrarium paddock stable kennel
""".split()
HELD_OUT_PLACES = """
orchard pergola bunker hangar chapel pantry scullery foundry smithy lagoon culvert jetty veranda cloister
smokehouse tannery apiary arboretum weir sluice bellows crucible loft scaffold parlour gatehouse icehouse
""".split()
SITES = """
greenhouse farm building plant factory depot school hospital station warehouse office campus museum hotel
brewery dairy orchardhouse vineyard harbour marina tunnel mine quarry sawmill bakery laundry datacenter clinic
lab observatory stadium arena market terminal garage barn villa house cottage tower block estate colony
""".split()
HELD_OUT_SITES = (
    "monastery lighthouse distillery fishery heliport seminary aquaduct refinery glasshouse".split()
)
_COMMON = """
the a my our your we you they it is are was has have will can go come leave wait look take bring open
close ready late soon now here there today tonight tomorrow in on at for with from to of and or not please
hello thanks water food dog cat child mother father friend train car bike rain snow sun cold warm hot
green red blue big small old new first last
""".split()
_ONSETS = "b c d f g h j k l m n p r s t v w z br ch cr dr fl gr kl pl pr sch sh sk sl st str th tr".split()
_VOWELS = "a e i o u ai au ea ei ie io oo ou".split()
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "x", "nd", "rk", "st", "ck", "lm"]


@dataclass(frozen=True)
class Quantity:
    """A kind of measurement: its names, its units with a usual range, and what to do beyond a limit."""

    names: tuple[str, ...]
    units: tuple[tuple[str, float, float, int], ...]  # unit, usual low, usual high, decimals
    above: str
    below: str
    short: tuple[str, ...] = ()


_T = ("Check cooling and ventilation.", "Check heating.")
QUANTITIES = (
    Quantity(("temperature", "room temperature"), (("°C", 16, 28, 1), ("°F", 60, 82, 1)), *_T, ("temp", "t")),
    Quantity(
        ("air temperature", "ambient temperature"), (("°C", 5, 32, 1), ("°F", 41, 90, 1)), *_T, ("air", "ta")
    ),
    Quantity(("water temperature", "flow temperature"), (("°C", 10, 65, 1),), *_T, ("water_temp", "tw")),
    Quantity(("soil temperature", "surface temperature"), (("°C", 4, 28, 1),), *_T, ("soil_temp", "ts")),
    Quantity(("freezer temperature", "cold store temperature"), (("°C", -26, -16, 1),), *_T, ("cold", "tf")),
    Quantity(
        ("humidity", "relative humidity", "air humidity"),
        (("%", 30, 80, 0), ("%", 30, 80, 1), ("%RH", 35, 75, 1)),
        "Check ventilation.",
        "Check humidification.",
        ("hum", "rh"),
    ),
    Quantity(
        ("soil moisture", "substrate moisture"),
        (("%", 25, 70, 0), ("%", 25, 70, 1)),
        "Check drainage.",
        "Check irrigation.",
        ("moisture", "soil"),
    ),
    Quantity(
        ("CO2", "carbon dioxide"),
        (("ppm", 400, 1500, 0),),
        "Ventilate.",
        "Check the CO2 supply.",
        ("co2",),
    ),
    Quantity(
        ("PM2.5", "particulate matter", "dust"),
        (("µg/m3", 2, 60, 0), ("µg/m3", 2, 60, 1)),
        "Check air filters.",
        "Inspect the sensor.",
        ("pm", "dust"),
    ),
    Quantity(
        ("VOC", "air quality index"),
        (("ppb", 50, 900, 0), ("", 10, 200, 0)),
        "Ventilate.",
        "Inspect the sensor.",
        ("voc", "aqi"),
    ),
    Quantity(
        ("tank level", "water level", "level", "fill level"),
        (("%", 15, 95, 0), ("cm", 40, 260, 0), ("m", 0.6, 4.5, 2)),
        "Check the inlet and the overflow.",
        "Refill and look for a leak.",
        ("level", "lvl"),
    ),
    Quantity(
        ("flow", "flow rate", "water flow"),
        (("l/min", 4, 60, 1), ("m3/h", 1, 30, 2)),
        "Check the valves.",
        "Check the pump.",
        ("flow", "q"),
    ),
    Quantity(
        ("pressure", "line pressure", "air pressure"),
        (("bar", 1, 8, 2), ("kPa", 90, 620, 0), ("hPa", 980, 1040, 0)),
        "Check the regulator.",
        "Check the pump.",
        ("press", "p"),
    ),
    Quantity(
        ("power", "electric power", "heat output"),
        (("W", 50, 3500, 0), ("kW", 0.5, 48, 2)),
        "Reduce the load.",
        "Check the supply.",
        ("power", "pw"),
    ),
    Quantity(
        ("voltage", "mains voltage"),
        (("V", 218, 242, 1), ("V", 11.2, 14.6, 2)),
        "Check the supply.",
        "Check the supply.",
        ("volt", "u"),
    ),
    Quantity(
        ("current", "motor current"),
        (("A", 0.5, 32, 2), ("A", 2, 120, 1)),
        "Reduce the load.",
        "Check the supply.",
        ("amps", "i"),
    ),
    Quantity(
        ("energy", "daily energy"),
        (("kWh", 1, 300, 1),),
        "Reduce the load.",
        "Inspect the sensor.",
        ("energy",),
    ),
    Quantity(
        ("battery", "battery level", "state of charge"),
        (("%", 20, 100, 0),),
        "Check the charger.",
        "Charge or replace the battery.",
        ("bat", "soc"),
    ),
    Quantity(
        ("vibration", "bearing vibration"),
        (("mm/s", 0.4, 7, 2),),
        "Inspect the bearings.",
        "Inspect the sensor.",
        ("vib",),
    ),
    Quantity(
        ("speed", "fan speed", "motor speed"),
        (("rpm", 300, 2900, 0),),
        "Check the drive.",
        "Check the drive.",
        ("speed", "rpm"),
    ),
    Quantity(
        ("light", "illuminance", "light level"),
        (("lux", 100, 40000, 0), ("lx", 80, 1200, 0)),
        "Check the shading.",
        "Check the lamps.",
        ("light", "lux"),
    ),
    Quantity(
        ("noise", "sound level"),
        (("dB", 35, 85, 0), ("dB", 35, 85, 1)),
        "Look for the source of noise.",
        "Inspect the sensor.",
        ("noise", "spl"),
    ),
    Quantity(
        ("pH",),
        (("", 5.2, 7.9, 2), ("", 5.2, 7.9, 1)),
        "Check the dosing.",
        "Check the dosing.",
        ("ph",),
    ),
    Quantity(
        ("conductivity", "EC"),
        (("mS/cm", 0.8, 3.4, 2),),
        "Check the dosing.",
        "Check the dosing.",
        ("ec",),
    ),
    Quantity(
        ("dissolved oxygen", "oxygen"),
        (("mg/l", 4, 11, 1),),
        "Check the aeration.",
        "Check the aeration.",
        ("do", "o2"),
    ),
    Quantity(
        ("wind speed", "air speed"),
        (("m/s", 0, 16, 1), ("km/h", 0, 60, 0)),
        "Secure loose parts.",
        "Inspect the sensor.",
        ("wind",),
    ),
    Quantity(
        ("weight", "load"),
        (("kg", 20, 900, 0), ("t", 1, 38, 1)),
        "Check the load.",
        "Check the load.",
        ("weight", "kg"),
    ),
    Quantity(
        ("frequency", "grid frequency"),
        (("Hz", 49.7, 50.3, 2),),
        "Check the inverter.",
        "Check the inverter.",
        ("freq",),
    ),
    Quantity(
        ("valve position", "damper position", "opening"),
        (("%", 0, 100, 0),),
        "Check the actuator.",
        "Check the actuator.",
        ("pos",),
    ),
    Quantity(
        ("occupancy", "people count"), (("", 0, 60, 0),), "Check access.", "Inspect the sensor.", ("people",)
    ),
)
# Sensors of 0 and 1.
STATES = (
    Quantity(
        ("contact", "door contact", "window contact", "door"),
        (("", 0, 1, 0), ("", 0, 1, 1)),
        "Check the doors and windows.",
        "Inspect the sensor.",
        ("contact", "open"),
    ),
    Quantity(
        ("water leak", "leak", "flood"),
        (("", 0, 1, 0), ("", 0, 1, 1)),
        "Look for a leak.",
        "Inspect the sensor.",
        ("leak",),
    ),
    Quantity(
        ("motion", "presence", "smoke", "alarm", "fault"),
        (("", 0, 1, 0), ("", 0, 1, 1)),
        "Look what set it off.",
        "Inspect the sensor.",
        ("motion", "alarm"),
    ),
    Quantity(
        ("state", "running", "pump state", "switch"),
        (("", 0, 1, 0), ("", 0, 1, 1)),
        "Check the switch.",
        "Inspect the sensor.",
        ("state", "on"),
    ),
)
GENERIC = ("Inspect the sensor.", "Inspect the sensor.")
SILENT_ACTION = "Check power and connection of silent sensors."


# Parts of the tokenizer's vocabulary, for words that hold every token; see `use_pieces`.
_PIECES: list[str] = []


def use_pieces(vocabulary: Iterable[str]) -> None:
    """Build half of all invented words from these tokens.

    A model learns to copy a token only by copying it: without this, tokens that no word list happens to hold
    are copied wrong in names that nobody has seen.
    """
    words = (token.removeprefix("▁") for token in vocabulary)
    _PIECES[:] = sorted({word for word in words if word.isascii() and word.isalpha()})


def invented_word(rng: random.Random, held_out: bool = False) -> str:
    """A word that nobody has seen; with `held_out` one that could be a word."""
    if _PIECES and not held_out and rng.random() < 0.6:
        return "".join(rng.choice(_PIECES) for _ in range(rng.choice([1, 2, 2, 3])))
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.randint(1, 3))
    )


def invented_text(rng: random.Random, words: int, held_out: bool) -> str:
    """Some words, known and invented."""
    known = (*PLACES, *SITES, *_COMMON)
    return " ".join(
        rng.choice(known) if rng.random() < 0.6 else invented_word(rng, held_out).lower()
        for _ in range(words)
    )


def known_text(rng: random.Random, words: int) -> str:
    """Some words of the lists."""
    return " ".join(rng.choice(rng.choice((PLACES, SITES, _COMMON))) for _ in range(words))


def place(rng: random.Random, held_out: bool) -> str:
    """One part of a sensor's name."""
    kind = rng.random()
    if kind < 0.35:
        word = rng.choice(HELD_OUT_PLACES if held_out else PLACES)
    elif kind < 0.75:
        word = invented_word(rng, held_out)
    else:
        return "".join(
            rng.choice("abcdefghijklmnopqrstuvwxyz0123456789ABCDEF") for _ in range(rng.randint(2, 8))
        )
    return f"{word}{rng.choice(['-', '', '_'])}{rng.randint(1, 40)}" if rng.random() < 0.5 else word


def site(rng: random.Random, held_out: bool) -> str:
    """A site's name, of one or two words."""
    word = (
        rng.choice(HELD_OUT_SITES if held_out else SITES)
        if rng.random() < 0.45
        else invented_word(rng, held_out)
    )
    if rng.random() < 0.3:
        word = word.capitalize()
    if rng.random() < 0.1:
        return f"{word} {rng.randint(1, 40)}"
    tail = rng.choice(
        [
            "",
            f"-{rng.randint(1, 99)}",
            f"-{rng.choice('abcdefgh')}",
            f"_{invented_word(rng, held_out)}",
            f"-{rng.choice(['north', 'south', 'east', 'west'])}",
        ]
    )
    return word + tail
