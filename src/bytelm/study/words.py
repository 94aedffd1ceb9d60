"""Sentences about differences, which say no more than the intervals do.

A member is ahead of the baseline, behind it, or its law steeper, only if the 95% interval of the
difference excludes 0; otherwise the two cannot be told apart.
"""

from collections.abc import Sequence

from bytelm.study.bootstrap import Difference
from bytelm.study.fit import SlopeDifference

AHEAD, BEHIND, SAME = "ahead", "behind", "cannot be told apart"


def side(difference: Difference) -> str:
    """Return whether a member is ahead of the baseline or behind it, if that is known."""
    return _sign(difference.low, difference.high, AHEAD, BEHIND)


def position(differences: Sequence[Difference]) -> str:
    """Say at which budgets a member is ahead of the baseline, and at which behind it.

    For example "behind at 1e+12; cannot be told apart at 5e+12 and 3e+13".
    """
    found: dict[str, list[str]] = {}
    for one in differences:
        found.setdefault(side(one), []).append(f"{one.budget:.3g}")
    return "; ".join(f"{what} at {_and(at)}" for what, at in found.items())


def slope(difference: SlopeDifference) -> str:
    """Say whether a member's law is steeper than the baseline's."""
    what = _sign(difference.low, difference.high, "flatter", "steeper")
    if what == SAME:
        return "the slopes of the two laws cannot be told apart"
    return f"its law is {what}"


def groups(differences: Sequence[Difference]) -> list[str]:
    """Say which members are ahead of the baseline, and which behind it: a line for each group.

    For example "behind: X; Y at 1e+12 and 3e+13".
    """
    found: dict[str, dict[str, list[str]]] = {AHEAD: {}, BEHIND: {}, SAME: {}}
    for one in differences:
        found[side(one)].setdefault(one.name, []).append(f"{one.budget:.3g}")
    has_budgets = len({one.budget for one in differences}) > 1
    return [
        f"{what}: "
        + "; ".join(f"{name} at {_and(at)}" if has_budgets else name for name, at in names.items())
        for what, names in found.items()
        if names
    ]


def _sign(low: float, high: float, below: str, above: str) -> str:
    return below if high < 0 else above if low > 0 else SAME


def _and(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
