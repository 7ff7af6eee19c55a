"""Random smart-home dialogues: tools declared, commands given, tools called in Gemma 4's syntax, answers.

Tool and parameter names vary, so that the declaration has to be read. Words come from one of three sources:
"training"; "held_out", rooms, devices and values that training never uses; or "spoken", words that a voice
can say and an ear can spell.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from .words import PLACES, invented_text, invented_word, known_text, place

Source = Literal["training", "held_out", "spoken"]
Draw = Callable[[random.Random, Source], Any]

_ROOMS = (
    """
kitchen|living room|bedroom|bathroom|hallway|office|garage|attic|cellar|garden|balcony|dining room|guest room
nursery|study|laundry room|workshop|greenhouse|porch|staircase|playroom|basement|lobby|terrace|pantry
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
_HELD_OUT_ROOMS = (
    "conservatory|library|music room|wine cellar|boathouse|sun room|utility room|mud room|gym".split("|")
)
_HELD_OUT_LABELS = "risotto|sourdough|meditation|violin practice".split("|")
_LABELS = "pasta|eggs|tea|laundry|pizza|bread|nap|workout|homework|rice|coffee|break|cake|call|plants".split(
    "|"
)
_DEVICES = (
    """
coffee machine|heater|pump|radio|television|humidifier|dehumidifier|air purifier|printer|charger|fountain
router|floor lamp|desk lamp|kettle|dishwasher|washing machine|dryer|oven|freezer|sprinkler
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
_HELD_OUT_DEVICES = "projector|aquarium pump|towel warmer|sewing machine|telescope mount".split("|")
_DOORS = "front door|back door|garage door|garden gate|side door|cellar door|patio door".split("|")
_HELD_OUT_DOORS = "barn door|stable gate|roof hatch".split("|")
_MESSAGES = (
    """
dinner is ready|we leave in ten minutes|the door is open
good night|please come down|it is raining
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
_HELD_OUT_MESSAGES = "the cake is in the oven|grandma has arrived|the bus comes soon".split("|")
_SENSOR_ENDS = ("temperature", "humidity", "co2", "power", "level")


def _room(rng: random.Random, source: Source) -> str:
    if source == "spoken":
        return rng.choice(_ROOMS)
    held_out = source == "held_out"
    kind = rng.random()
    if kind < 0.25:
        return place(rng, held_out)
    if kind < 0.45:
        kind_of_room = rng.choice(["room", "hall", "corner", "wing", "cellar"])
        return f"{invented_word(rng, held_out).lower()} {kind_of_room}"
    return rng.choice(_HELD_OUT_ROOMS if held_out else _ROOMS)


def _device(rng: random.Random, source: Source) -> str:
    if source == "spoken":
        return rng.choice(_DEVICES)
    held_out = source == "held_out"
    if rng.random() < 0.4:
        return f"{invented_word(rng, held_out).lower()} {rng.choice(['pump', 'lamp', 'fan', 'plug'])}"
    return rng.choice(_HELD_OUT_DEVICES if held_out else _DEVICES)


def _integer(low: int, high: int) -> Draw:
    """Whole numbers; the fifth that leaves remainder 3 is held out."""

    def draw(rng: random.Random, source: Source) -> int:
        while True:
            value = rng.randint(low, high)
            if source == "spoken" or (value % 5 == 3) == (source == "held_out"):
                return value

    return draw


def _one_of(train: list[str], held_out_list: list[str], words: tuple[int, int]) -> Draw:
    """A text of the list, or as often one of so many words that nobody has written."""

    def draw(rng: random.Random, source: Source) -> str:
        if source == "spoken":
            return rng.choice(train) if rng.random() < 0.8 else known_text(rng, rng.randint(*words))
        held_out = source == "held_out"
        if rng.random() < 0.5:
            return invented_text(rng, rng.randint(*words), held_out)
        return rng.choice(held_out_list if held_out else train)

    return draw


def _message(rng: random.Random, source: Source) -> str:
    """What to say; some of it holds the words that also lead to the room: "the cake is in the oven"."""
    text: str = _one_of(_MESSAGES, _HELD_OUT_MESSAGES, (1, 7))(rng, source)
    if source != "spoken" and rng.random() < 0.25:
        held_out = source == "held_out"
        where = place(rng, held_out) if rng.random() < 0.5 else _room(rng, source)
        short = invented_text(rng, rng.randint(1, 4), held_out)
        link = rng.choice(("in the", "is in the", "at the", "for the", "is on the", "that the", "in"))
        text = f"{short} {link} {where}"
        if rng.random() < 0.3:
            text += " " + invented_text(rng, rng.randint(1, 2), held_out)
    return text


def _zone(rng: random.Random, source: Source) -> str:
    if source == "spoken":
        return rng.choice(PLACES) + rng.choice(["", f" {rng.randint(1, 40)}"])
    return place(rng, source == "held_out")


def _sensor(rng: random.Random, source: Source) -> str:
    if source == "spoken":
        return f"{_zone(rng, source)} {rng.choice(_SENSOR_ENDS)}"
    return f"{place(rng, source == 'held_out')}/{rng.choice(_SENSOR_ENDS)}"


def _clock(rng: random.Random, source: Source) -> str:
    minute = rng.choice(
        [3, 8, 13, 23, 38, 53] if source == "held_out" else [0, 5, 10, 15, 20, 30, 40, 45, 50]
    )
    return f"{rng.randint(0, 23):02d}:{minute:02d}"


@dataclass(frozen=True)
class Slot:
    """One parameter: names it may have, its JSON type, its values, and whether a command may leave it out."""

    names: tuple[str, ...]
    type: str
    draw: Draw | None  # None: the words of the phrase fix the value
    description: str
    enum: tuple[str, ...] = ()


@dataclass(frozen=True)
class Phrase:
    """A way to ask: a template over slot keys, with the values that the words themselves fix."""

    text: str
    fixed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Action:
    """A kind of tool: names, descriptions, slots and phrases."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    slots: dict[str, Slot]
    phrases: tuple[Phrase, ...]
    done: str


_ROOM = Slot(("room", "area", "location"), "string", _room, "Name of the room")
_ONOFF = Slot(("state", "power"), "string", None, "on or off", ("on", "off"))


def P(text: str, **fixed: Any) -> Phrase:
    return Phrase(text, fixed)


ACTIONS = (
    Action(
        ("set_light", "light_set", "control_light"),
        ("Set the light of a room.", "Control the lights."),
        {
            "room": _ROOM,
            "level": Slot(
                ("brightness", "level", "percent"), "integer", _integer(1, 100), "Brightness in percent"
            ),
        },
        (
            P("Set the {room} light to {level} percent."),
            P("Dim the lights in the {room} to {level}%."),
            P("{room} lights at {level} please"),
            P("Make the {room} light {level} percent bright."),
            P("I want {level} percent light in the {room}."),
            P("brightness {level} in the {room}"),
        ),
        "The {room} light is at {level} percent.",
    ),
    Action(
        ("switch_light", "turn_light", "light_power"),
        ("Switch the light of a room on or off.", "Turn lights on and off."),
        {"room": _ROOM, "state": _ONOFF},
        (
            P("Turn on the light in the {room}.", state="on"),
            P("Turn off the {room} light.", state="off"),
            P("Lights off in the {room} please.", state="off"),
            P("Lights on in the {room}.", state="on"),
            P("It is dark in the {room}.", state="on"),
            P("Switch the {room} lights off", state="off"),
            P("Switch the {room} lights on", state="on"),
        ),
        "The {room} light is {state}.",
    ),
    Action(
        ("set_temperature", "set_thermostat", "climate_set"),
        ("Set the target temperature of a room.", "Control the heating."),
        {
            "room": _ROOM,
            "celsius": Slot(("celsius", "temperature", "target"), "integer", _integer(5, 32), "Target in °C"),
        },
        (
            P("Heat the {room} to {celsius} degrees."),
            P("Set the {room} thermostat to {celsius}."),
            P("Make it {celsius} degrees in the {room}."),
            P("I want {celsius} °C in the {room}"),
            P("{room} temperature {celsius} please"),
            P("Cool the {room} down to {celsius} degrees."),
        ),
        "The {room} is set to {celsius} °C.",
    ),
    Action(
        ("set_blinds", "move_blinds", "cover_position"),
        ("Move the blinds of a room.", "Open or close blinds."),
        {
            "room": _ROOM,
            "position": Slot(("position", "open_percent"), "integer", _integer(1, 99), "0 closed, 100 open"),
        },
        (
            P("Open the blinds in the {room} to {position} percent."),
            P("Set the {room} blinds to {position}%."),
            P("Close the {room} blinds.", position=0),
            P("Open the {room} blinds.", position=100),
            P("Blinds in the {room} at {position} percent please."),
            P("Shut the blinds in the {room}", position=0),
        ),
        "The {room} blinds are at {position} percent.",
    ),
    Action(
        ("lock_door", "set_lock", "door_lock"),
        ("Lock or unlock a door.", "Control a door's lock."),
        {
            "door": Slot(
                ("door", "name"), "string", _one_of(_DOORS, _HELD_OUT_DOORS, (1, 2)), "Name of the door"
            ),
            "locked": Slot(("locked", "lock"), "boolean", None, "true to lock"),
        },
        (
            P("Lock the {door}.", locked=True),
            P("Unlock the {door}.", locked=False),
            P("Please make sure the {door} is locked", locked=True),
            P("Open the lock of the {door}.", locked=False),
            P("{door} locked please", locked=True),
        ),
        "Done.",
    ),
    Action(
        ("set_fan", "fan_speed", "ventilate"),
        ("Set the fan of a room.", "Control ventilation."),
        {
            "room": _ROOM,
            "speed": Slot(("speed", "mode"), "string", None, "Fan speed", ("off", "low", "medium", "high")),
        },
        (
            P("Set the fan in the {room} to low.", speed="low"),
            P("{room} fan on high.", speed="high"),
            P("Run the {room} fan at medium speed.", speed="medium"),
            P("Turn the {room} fan off.", speed="off"),
            P("Full ventilation in the {room}!", speed="high"),
            P("A little air in the {room} please.", speed="low"),
        ),
        "The {room} fan is {speed}.",
    ),
    Action(
        ("switch_device", "set_switch", "plug_control"),
        ("Switch a device on or off.", "Control a smart plug."),
        {
            "device": Slot(("device", "name", "plug"), "string", _device, "Name of the device"),
            "state": _ONOFF,
        },
        (
            P("Turn on the {device}.", state="on"),
            P("Turn off the {device}.", state="off"),
            P("Switch the {device} off please.", state="off"),
            P("Start the {device}", state="on"),
            P("Stop the {device}.", state="off"),
            P("I need the {device}.", state="on"),
        ),
        "The {device} is {state}.",
    ),
    Action(
        ("start_timer", "set_timer", "timer_start"),
        ("Start a timer.", "Start a countdown."),
        {
            "minutes": Slot(
                ("minutes", "duration_minutes"), "integer", _integer(1, 180), "Length in minutes"
            ),
            "label": Slot(
                ("label", "name"), "string", _one_of(_LABELS, _HELD_OUT_LABELS, (1, 3)), "What it is for"
            ),
        },
        (
            P("Set a {minutes} minute timer for {label}."),
            P("Remind me about {label} in {minutes} minutes."),
            P("Timer {minutes} minutes, {label}"),
            P("Start a timer for {label}: {minutes} minutes."),
        ),
        "Timer for {label}: {minutes} minutes.",
    ),
    Action(
        ("set_alarm", "alarm_set", "wake_up"),
        ("Set an alarm.", "Set a wake-up time."),
        {"time": Slot(("time", "at"), "string", _clock, "Time as HH:MM")},
        (
            P("Wake me at {time}."),
            P("Set an alarm for {time}."),
            P("I have to get up at {time}"),
            P("Alarm {time} please."),
        ),
        "Alarm set for {time}.",
    ),
    Action(
        ("water_zone", "start_irrigation", "irrigate"),
        ("Water a zone of the garden.", "Run the irrigation."),
        {
            "zone": Slot(("zone", "area"), "string", _zone, "Name of the zone"),
            "minutes": Slot(("minutes", "duration"), "integer", _integer(1, 60), "How long, in minutes"),
        },
        (
            P("Water {zone} for {minutes} minutes."),
            P("Irrigate {zone}, {minutes} minutes."),
            P("Run the irrigation of {zone} for {minutes} min"),
            P("Give {zone} water for {minutes} minutes please."),
        ),
        "Watering {zone} for {minutes} minutes.",
    ),
    Action(
        ("announce", "say", "broadcast"),
        ("Say a message in a room.", "Play an announcement."),
        {
            "room": _ROOM,
            "message": Slot(("message", "text"), "string", _message, "What to say"),
        },
        (
            P("Tell the {room}: {message}."),
            P("Announce in the {room} that {message}."),
            P("Say {message} in the {room}."),
        ),
        "Done.",
    ),
    Action(
        ("read_sensor", "get_sensor", "sensor_value"),
        ("Read a sensor.", "Get the current value of a sensor."),
        {
            "sensor": Slot(
                ("sensor", "name", "id"),
                "string",
                _sensor,
                "Name of the sensor",
            )
        },
        (
            P("What does {sensor} read?"),
            P("Read {sensor}."),
            P("Current value of {sensor}?"),
            P("How is {sensor} now?"),
            P("What is the {sensor}?"),
            P("Tell me the {sensor}."),
        ),
        "{sensor} reads {value}.",
    ),
)
_SYSTEMS = (
    "You control a home. Call a tool when one fits.",
    "You are a home assistant. Use the tools.",
    "You are a voice assistant on a small device.",
    "Act on the user's commands with the tools given.",
    "",
)
NO_TOOL = "I have no tool for that."
_LISTED = ("room", "door", "device", "zone", "sensor")  # slots whose names a tool may list
_UNKNOWN_NAMES = 1 / 6
_ERRORS = (
    "unreachable",
    "no value",
    "its last value is {n} minutes old",
    "its last message cannot be read",
)


@dataclass(frozen=True)
class _Tool:
    """An action under the names it has in one dialogue."""

    action: Action
    name: str
    keys: dict[str, str]  # slot -> parameter name
    known: dict[str, tuple[str, ...]]  # slot -> the only names there are

    def declaration(self, description: str) -> dict[str, Any]:
        properties: dict[str, Any] = {}
        for key, slot in self.action.slots.items():
            schema: dict[str, Any] = {"type": slot.type, "description": slot.description}
            if enum := slot.enum or self.known.get(key):
                schema["enum"] = list(enum)
            properties[self.keys[key]] = schema
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": description,
                "parameters": {"type": "object", "properties": properties, "required": list(properties)},
            },
        }


def random_commands(
    rng: random.Random,
    *,
    held_out: bool = False,
    source: Source | None = None,
    accept: Callable[[str], bool] = lambda text: True,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(messages, tools) of a dialogue of one to four commands, each with its tool call, result and answer.

    Commands that `accept` refuses are drawn again. `held_out` is short for that source.
    """
    source = source or ("held_out" if held_out else "training")
    chosen = rng.sample(ACTIONS, rng.randint(1, 4))
    tools = [
        _Tool(
            a,
            rng.choice(a.names),
            {key: rng.choice(slot.names) for key, slot in a.slots.items()},
            _known_names(rng, a, source),
        )
        for a in chosen
    ]
    messages: list[dict[str, Any]] = []
    if system := rng.choice(_SYSTEMS):
        messages.append({"role": "system", "content": system})
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.1:
            other = rng.choice([a for a in ACTIONS if a not in chosen])
            text, _values = _command(rng, other, source, accept, {})
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": NO_TOOL}]
            continue
        messages += _exchange(rng, rng.choice(tools), source, accept)
    return messages, [tool.declaration(rng.choice(tool.action.descriptions)) for tool in tools]


def random_sentence(rng: random.Random, action: Action) -> str:
    """A command that can be spoken."""
    return _command(rng, action, "spoken", lambda text: True, {})[0]


def _known_names(rng: random.Random, action: Action, source: Source) -> dict[str, tuple[str, ...]]:
    """Some tools list the rooms, doors, devices, zones or sensors that there are."""
    found = {}
    for key, slot in action.slots.items():
        if key in _LISTED and rng.random() < 0.3:
            assert slot.draw is not None, key
            names = [slot.draw(rng, source) for _ in range(rng.randint(2, 7))]
            found[key] = tuple(dict.fromkeys(names))
    return found


def _command(
    rng: random.Random,
    action: Action,
    source: Source,
    accept: Callable[[str], bool],
    known: dict[str, tuple[str, ...]],
) -> tuple[str, dict[str, Any]]:
    """What is said, and the values of the slots: one in six of the names is not a known one."""
    while True:
        phrase = rng.choice(action.phrases)
        values = dict(phrase.fixed)
        for key, slot in action.slots.items():
            if key not in values:
                assert slot.draw is not None, key
                listed = key in known and rng.random() > _UNKNOWN_NAMES
                values[key] = rng.choice(known[key]) if listed else slot.draw(rng, source)
        text = phrase.text.format(**values)
        if accept(text):
            break
    if source == "spoken":
        return text, {key: values[key] for key in action.slots}
    style = rng.random()
    if style < 0.15:
        text = (
            text.lower() if not any(isinstance(v, str) and v != v.lower() for v in values.values()) else text
        )
    elif style < 0.3:
        text = rng.choice(["Please: ", "Hey, ", "OK, "]) + text
    return text, {key: values[key] for key in action.slots}


def _exchange(
    rng: random.Random, tool: _Tool, source: Source, accept: Callable[[str], bool]
) -> list[dict[str, Any]]:
    text, values = _command(rng, tool.action, source, accept, tool.known)
    call = {
        "function": {"name": tool.name, "arguments": {tool.keys[key]: value for key, value in values.items()}}
    }
    result: dict[str, Any] = {"status": "ok"}
    shown = dict(values)
    if "{value}" in tool.action.done:
        value = round(rng.uniform(-20, 2000), rng.randint(0, 2))
        result = {"value": f"{value:g} {rng.choice(['°C', '%', 'ppm', 'W', 'bar'])}"}
        shown["value"] = result["value"]
    answer = tool.action.done.format(**shown)
    if error := _error(rng, tool, values):
        result, answer = {"error": error}, f"That failed: {error}" + ("" if error.endswith("?") else ".")
    return [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": tool.name, "content": result},
        {"role": "assistant", "content": answer},
    ]


def _error(rng: random.Random, tool: _Tool, values: dict[str, Any]) -> str | None:
    """Why the tool refuses this call, in the words of the voice assistant's tools; mostly it does not."""
    for key, names in tool.known.items():
        name = tool.keys[key]
        if values[key] not in names:
            hint = (
                f"did you mean {rng.choice(names)!r}?" if rng.random() < 0.5 else f"known: {', '.join(names)}"
            )
            return f"{name}: there is no {values[key]!r}; {hint}"
    for key, slot in tool.action.slots.items():
        if slot.type == "integer" and rng.random() < 0.03:
            low, high = sorted((rng.randint(0, 100), rng.randint(0, 100)))
            limits = rng.choice([f"at least {low} and at most {high}", f"at least {low}", f"at most {high}"])
            return f"{tool.keys[key]}: {values[key]} is out of range; {limits}"
    if rng.random() < 0.04:
        return rng.choice(_ERRORS).format(n=rng.randint(2, 900))
    return None
