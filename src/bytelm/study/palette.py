"""Colours and marks of families, the same in all figures.

The colours are those of Okabe and Ito, which people with colour blindness can tell apart. Families
of one colour, such as a model and a variant of it, differ in their marks and lines.
"""

from collections import Counter
from typing import Literal, NamedTuple, get_args

from bytelm.study.plan import Colour, Plan

HEX: dict[Colour, str] = {
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "black": "#1f1f1f",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
    "grey": "#8c8c8c",
}
MARKERS = "osD^vP"
LINES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
AHEAD, BEHIND, NEITHER = HEX["blue"], HEX["vermilion"], HEX["grey"]
"""Colours of differences from a baseline: where 0 is above the interval, below, or in it."""


class Look(NamedTuple):
    """How a family is drawn."""

    colour: str
    marker: str
    is_filled: bool
    line: str

    @property
    def face(self) -> str:
        """Return the colour inside the mark."""
        return self.colour if self.is_filled else "white"


def looks(plan: Plan) -> dict[str, Look]:
    """Return the look of each label of a plan's families, and of their sizes where these differ."""
    free = [
        name for name in get_args(Colour) if name not in {f.colour for f in plan.families.values()}
    ]
    free = free or list(get_args(Colour))
    given: dict[str, Colour] = {}
    for name, family in plan.families.items():
        unnamed = sum(plan.families[other].colour is None for other in given)
        given[name] = family.colour or free[unnamed % len(free)]
    labels = {family.label: name for name, family in plan.families.items()}
    for comparison in plan.comparisons.values():
        for member in comparison.families:
            labels.setdefault(plan.label(member), member.partition("/")[0])
    used: Counter[str] = Counter()
    found = {}
    for label, name in labels.items():
        colour = given[name]
        number = used[colour]
        used[colour] += 1
        marker, line = MARKERS[number % len(MARKERS)], LINES[number % len(LINES)]
        found[label] = Look(HEX[colour], marker, number % 2 == 0, line)
    return found
