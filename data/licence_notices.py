"""Licence notices with the licence that they name, from the rules of licensedcode-data."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from packages import Unpacked

SHORTEST, LONGEST = 40, 240  # characters
FEWEST = 10  # notices of a licence, for it to be learnt
# Names of what is no one licence.
CATCH_ALL = re.compile("other-|unknown|generic|warranty|proprietary|commercial")
# Notices that share so much of their words are one unit: never in training and held out both.
ALIKE = 0.7


class Notice(NamedTuple):
    """A notice, and the key and category of its licence."""

    rule: str
    text: str
    licence: str
    category: str


def notices(package: Unpacked) -> list[Notice]:
    """Return the short English notices of single licences that have enough of them.

    What stands in the text of a licence is left out: the embedded model has read these.
    """
    data = package.folder / "licensedcode/data"
    licences = {
        path.stem: path.read_text(encoding="utf-8")
        for path in (data / "licenses").glob("*.LICENSE")
    }
    categories = {
        key: found[1]
        for key, text in licences.items()
        if (found := re.search(r"^category: (.*)$", text, re.M))
    }
    known = " ".join(" ".join(licences.values()).split())
    found: dict[str, Notice] = {}
    for path in sorted((data / "rules").glob("*.RULE")):
        _, metadata, body = path.read_text(encoding="utf-8").split("---\n", 2)
        licence = re.search(r"^license_expression: (\S+)$", metadata, re.M)
        if licence is None or licence[1] not in categories or CATCH_ALL.search(licence[1]):
            continue
        if "is_license_notice: yes" not in metadata or "language:" in metadata:
            continue
        text = " ".join(body.replace("{{", "").replace("}}", "").split())
        if SHORTEST <= len(text) <= LONGEST and text.isascii() and text not in known:
            found.setdefault(text, Notice(path.stem, text, licence[1], categories[licence[1]]))
    counts = Counter(notice.licence for notice in found.values())
    return [notice for notice in found.values() if counts[notice.licence] >= FEWEST]


def units(found: list[Notice]) -> Iterator[list[Notice]]:
    """Divide notices into units, each of what is alike, directly or through others."""
    words = [frozenset(re.findall("[a-z]+", notice.text.lower())) for notice in found]
    unit = list(range(len(found)))

    def root(place: int) -> int:
        while unit[place] != place:
            unit[place] = unit[unit[place]]
            place = unit[place]
        return place

    for place, own in enumerate(words):
        for before, other in enumerate(words[:place]):
            # Of most pairs the sizes tell that they cannot be alike.
            if not ALIKE * len(own) <= len(other) <= len(own) / ALIKE:
                continue
            common = len(own & other)
            if common >= ALIKE * (len(own) + len(other) - common):
                unit[root(place)] = root(before)
    members: dict[int, list[Notice]] = {}
    for place, notice in enumerate(found):
        members.setdefault(root(place), []).append(notice)
    yield from members.values()
