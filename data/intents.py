"""Expand the sentence templates of Home Assistant's English intents into labelled sentences.

A template is one line of the package's grammar, for example

    <turn> on [<the>] {area} fan[s]

with expansion rules in angle brackets, optional and alternative parts, and slots in braces.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hassil.expression import (
    Alternative,
    Expression,
    ListReference,
    Permutation,
    RuleReference,
    Sequence,
    TextChunk,
)
from hassil.parse_expression import parse_sentence

MOST_SLOTS = 2
# Intents that are left out have a single template or take free text.
INTENTS = (
    "HassCancelTimer",
    "HassClimateGetTemperature",
    "HassClimateSetFanMode",
    "HassClimateSetTemperature",
    "HassDecreaseTimer",
    "HassFanSetSpeed",
    "HassGetState",
    "HassGetWeather",
    "HassIncreaseTimer",
    "HassLightSet",
    "HassMediaNext",
    "HassMediaPause",
    "HassMediaPrevious",
    "HassMediaUnpause",
    "HassPauseTimer",
    "HassSetPosition",
    "HassSetVolume",
    "HassSetVolumeRelative",
    "HassShoppingListAddItem",
    "HassStartTimer",
    "HassTimerStatus",
    "HassTurnOff",
    "HassTurnOn",
    "HassUnpauseTimer",
    "HassVacuumStart",
)
# Timers that are told apart by the time they started with ("the 5 minute timer"), and half hours.
LEFT_OUT = ("start_", "timer_half")
# A home has its own areas, floors, devices and items, which the package leaves open.
# No garage: "the garage door" is a kind of door there.
AREAS = ["attic", "basement", "bathroom", "bedroom", "dining room", "garden", "hallway", "kitchen"]
AREAS += ["living room", "nursery", "office", "study"]
OPEN_LISTS: dict[str, list[str]] = {
    "area": AREAS,
    "floor": ["first", "ground", "second", "top"],
    "timer_name": ["bread", "egg", "laundry", "pasta", "pizza", "tea"],
    "shopping_list_item": ["apples", "bread", "cheese", "coffee", "eggs", "milk", "rice", "soap"],
}
DEVICES: dict[str, list[str]] = {
    "light": ["bedside lamp", "chandelier", "desk lamp", "night light", "spotlight"],
    "switch": ["coffee maker", "heater", "toaster"],
    "fan": ["ceiling fan", "tower fan"],
    "media_player": ["radio", "soundbar", "speaker", "television"],
    "climate": ["boiler", "thermostat"],
    "cover": ["left curtain", "roof window", "side gate"],
    "lock": ["back door", "front door"],
    "vacuum": ["robot", "roomba"],
    "weather": ["london", "paris", "tokyo"],
    "scene": ["movie night", "party time"],
}
# Without its verb, "all lights on" would ask for the state as well as turn the lights on.
RULES = {"are_any": "(is|are) any [of <the>]", "are_all": "(is|are) all [of] [<the>]"}
# Ranges are thinned out, so that every number has been seen often enough to be copied.
PERCENTAGES = range(5, 101, 5)
RANGES: dict[str, range] = {
    "temperature": range(10, 31),
    "position": PERCENTAGES,
    "fan_speed": PERCENTAGES,
    "brightness": PERCENTAGES,
    "volume": PERCENTAGES,
    "timer_seconds": range(5, 61, 5),
    "timer_minutes": range(1, 61),
    "timer_hours": range(1, 13),
}


@dataclass(frozen=True)
class Template:
    """A grammar line with its intent, the slots it always has, and the devices it may name."""

    name: str
    intent: str
    text: str
    fixed_slots: tuple[tuple[str, str], ...]
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A sentence, its slots sorted by name, and its pattern: the sentence with slots unfilled."""

    sentence: str
    pattern: str
    slots: tuple[tuple[str, str | int], ...]


class Grammar:
    """The package's templates, rules and lists, and random sentences made of them."""

    def __init__(self, definition: dict[str, Any]) -> None:
        self._rules = {
            name: parse_sentence(text).expression
            for name, text in {**definition["expansion_rules"], **RULES}.items()
        }
        self._values: dict[str, list[tuple[Expression, str | int]]] = {
            name: [
                (parse_sentence(item["in"]).expression, item["out"]) for item in content["values"]
            ]
            for name, content in definition["lists"].items()
            if "values" in content
        }
        for name, words in OPEN_LISTS.items():
            self._values[name] = [(TextChunk(word), word) for word in words]
        for name, numbers in RANGES.items():
            self._values[name] = [(TextChunk(str(number)), number) for number in numbers]
        self._intents = definition["intents"]

    def templates(self) -> Iterator[Template]:
        """Yield the templates of INTENTS with few slots, all with closed lists of values."""
        for intent in INTENTS:
            number = itertools.count()
            for block in self._intents[intent]["data"]:
                domains = block.get("requires_context", {}).get("domain", [])
                devices = tuple(device for domain in domains for device in DEVICES.get(domain, []))
                fixed = tuple(block.get("slots", {}).items())
                for text in block["sentences"]:
                    name = f"{intent.removeprefix('Hass')}-{next(number)}"
                    template = Template(name, intent, text, fixed, devices)
                    if self._is_usable(template):
                        yield template

    def sample(self, template: Template, rng: random.Random) -> Sample:
        """Return one random sentence of `template`."""
        slots: dict[str, str | int] = dict(template.fixed_slots)
        parts: list[tuple[str, str]] = []  # (text, text of the pattern)

        def expand(node: Expression) -> None:
            if isinstance(node, TextChunk):
                parts.append((node.text, node.text))
            elif isinstance(node, RuleReference):
                expand(self._rules[node.rule_name])
            elif isinstance(node, ListReference):
                start = len(parts)
                value, slots[node.slot_name] = rng.choice(self._choices(node.list_name, template))
                expand(value)
                text = "".join(part for part, _ in parts[start:])
                parts[start:] = [(text, f"{{{node.slot_name}}}")]
            elif isinstance(node, Alternative):
                expand(rng.choice(node.items))
            elif isinstance(node, Permutation):
                for item in rng.sample(node.items, len(node.items)):
                    expand(item)
            elif isinstance(node, Sequence):
                for item in node.items:
                    expand(item)

        expand(parse_sentence(template.text).expression)
        sentence, pattern = (" ".join("".join(side).split()) for side in zip(*parts, strict=True))
        return Sample(sentence, pattern, tuple(sorted(slots.items())))

    def _choices(self, name: str, template: Template) -> list[tuple[Expression, str | int]]:
        if name == "name":
            return [(TextChunk(device), device) for device in template.devices]
        return self._values[name]

    def _is_usable(self, template: Template) -> bool:
        sentence = parse_sentence(template.text)
        names = list(sentence.list_names({}))
        closed = {"name", *self._values} if template.devices else set(self._values)
        if len(names) > MOST_SLOTS or any(part in template.text for part in LEFT_OUT):
            return False
        return closed.issuperset(names)
