"""Fill rows to both of their budgets, bytes and patches, with the beginnings of two spans.

A row that is filled by spans in their order is full as soon as one budget is used up, and the rest
of the other is padding: text whose patches are long leaves patches over, text whose patches are
short leaves bytes. A span of long patches and one of short patches use up both if they are cut at
the right place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int32]
"""Units in the first ``k`` positions of a span, for ``k`` from 0 to its length."""


class Cut(NamedTuple):
    """How two spans fill what is left of a row."""

    partner: int | None
    """Index of the span that follows the first one; ``None`` if the first one fills the row."""
    length: int
    """Positions of the first span; the rest of the bytes is for the partner."""
    misfit: int
    """Units that are left over, or for which there is no room."""


def best_cut(counts: Sequence[Counts], room_bytes: int, room_units: int) -> Cut | None:
    r"""Return how the first of some spans, alone or with another, fills a row best.

    For a partner :math:`j` and a cut after :math:`k` positions, the misfit is
    :math:`|c_0(k) + c_j(B - k) - U|` with :math:`B` bytes and :math:`U` units of room. Of the cuts
    with the smallest misfit, the one that leaves the longest stretch whole is taken, so that
    contexts stay long.

    Args:
        counts: for each span, the units in its beginnings.
        room_bytes: positions that are left in the row, at least one.
        room_units: units that are left in the row, at least one.

    Returns:
        The cut; ``None`` if no two spans are long enough to use up the bytes.
    """
    first, best = counts[0], None
    if len(first) > room_bytes:
        best = Cut(None, room_bytes, abs(int(first[room_bytes]) - room_units))
    for partner, other in enumerate(counts[1:], 1):
        shortest = max(room_bytes - len(other) + 1, 1)
        longest = min(len(first) - 1, room_bytes - 1)
        if shortest > longest:
            continue
        # Views: the numbers of the partner from the last to the first.
        others = other[room_bytes - longest : room_bytes - shortest + 1][::-1]
        misfits = np.abs(first[shortest : longest + 1] + others - room_units)
        smallest = int(misfits.min())
        if best is not None and smallest > best.misfit:
            continue
        cuts = (misfits == smallest).nonzero()[0] + shortest
        # The first or last cut leaves the longest stretch.
        length = int(max((cuts[0], cuts[-1]), key=lambda k: max(k, room_bytes - k)))
        cut = Cut(partner, length, smallest)
        if best is None or _rank(cut, room_bytes) < _rank(best, room_bytes):
            best = cut
    return best


def _rank(cut: Cut, room_bytes: int) -> tuple[int, int]:
    return cut.misfit, -max(cut.length, room_bytes - cut.length)
