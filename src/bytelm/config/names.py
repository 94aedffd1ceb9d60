"""Configuration keys of earlier versions, and their present names.

Recipes, overrides, plans and checkpoints may use either. Only sections of our own kinds have
earlier names: a kind of another package may have a field of the same name.
"""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    ("model", "ngrams"): "hash_embeddings",
    ("hash_embeddings", "rows"): "num_buckets",
    ("optimizer", "rates"): "lr_multipliers",
}
"""Present name of a key, by the section that holds it and its earlier name."""
RENAMED_KINDS = {("model", "table"): "fitted_ngram"}
"""Present name of a kind, by the section it is the kind of and its earlier name."""
KINDS_WITH_EARLIER_NAMES = {"transformer", "blt"}
"""Kinds of the nodes that hold renamed keys, themselves or further down."""


def modernise(data: Any, section: str = "", *, is_ours: bool = True) -> Any:
    """Return plain data with the present names of its keys.

    Args:
        data: mappings, sequences and values.
        section: the key that holds them.
        is_ours: whether keys may have earlier names, unless the ``kind`` of the data says.
    """
    if isinstance(data, list | tuple):
        return type(data)(modernise(value, section, is_ours=is_ours) for value in data)
    if not isinstance(data, Mapping):
        return data
    is_ours = has_earlier_names(data, is_ours)
    renamed = {}
    for key, value in data.items():
        name = RENAMED.get((section, key), key) if is_ours else key
        # If a key is given under both names, the present one takes precedence.
        if name == key or name not in data:
            renamed[name] = modernise(value, str(name), is_ours=is_ours)
    kind = renamed.get("kind")
    if isinstance(kind, str) and (section, kind) in RENAMED_KINDS:
        renamed["kind"] = RENAMED_KINDS[section, kind]
    return renamed


def modern_path(path: str, data: Any = None) -> str:
    """Return a dotted path with the present names of its parts.

    Args:
        path: path of a value.
        data: the mapping that the path leads through, whose kinds say which names are ours.
    """
    parts: list[str] = []
    is_ours = True
    for part in path.split("."):
        is_ours = has_earlier_names(data, is_ours)
        section = parts[-1] if parts else ""
        parts.append(RENAMED.get((section, part), part) if is_ours else part)
        data = data.get(parts[-1]) if isinstance(data, Mapping) else None
    return ".".join(parts)


def earlier_path(path: str) -> str:
    """Return a dotted path with the earlier names of its parts, where they had any."""
    earlier = {(section, name): old for (section, old), name in RENAMED.items()}
    parts = modern_path(path).split(".")
    sections = ["", *parts]
    return ".".join(earlier.get(pair, pair[1]) for pair in zip(sections, parts, strict=False))


def has_earlier_names(data: Any, inherited: bool) -> bool:
    """Whether keys of a section may have earlier names; one without a kind is like its parent."""
    kind = data.get("kind") if isinstance(data, Mapping) else None
    return kind in KINDS_WITH_EARLIER_NAMES if isinstance(kind, str) else inherited
