"""Inheritance of mappings from others that they name.

A plan names another plan, a family another family of its plan, and a recipe a shipped recipe, all
in the same way. With ``b`` on the left, ``{like: b, model: {dim: 32}}`` gives the result on the
right::

    model: {dim: 64, num_layers: 2}         model: {dim: 32, num_layers: 2}
    data: {row_bytes: 512}                  data: {row_bytes: 512}
"""

from collections.abc import Callable, Mapping
from typing import Any

from bytelm.errors import ConfigError

LIKE = "like"
"""The key that names what a mapping inherits from."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` laid over it, section by section.

    A section whose ``kind`` differs replaces the one below it: their other keys have nothing in
    common.
    """
    if "kind" in base and "kind" in over and base["kind"] != over["kind"]:
        return dict(over)
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merge(below, value)
        result[key] = value
    return result


def inherit(
    data: Mapping[str, Any],
    find: Callable[[str], Mapping[str, Any]],
    where: str,
    names: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return ``data`` laid over the mapping that its ``like`` names, if it names one.

    That mapping may name another in turn, and so on.

    Args:
        data: the mapping.
        find: returns the mapping of a name.
        where: what to call ``data`` in an error.
        names: the names that have led to ``data``, its own last.

    Raises:
        ConfigError: the names lead back to one of themselves.
    """
    own = {key: value for key, value in data.items() if key != LIKE}
    name = data.get(LIKE)
    if name is None:
        return own
    chain = (*names, str(name))
    if str(name) in names:
        raise ConfigError(f"{where}: {LIKE} leads back to itself: {' -> '.join(chain)}")
    return merge(inherit(find(str(name)), find, where, chain), own)
