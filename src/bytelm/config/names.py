"""Names that configuration had in earlier versions, and what they are called now.

Recipes, overrides, plans and checkpoints may use either.
"""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    ("model", "ngrams"): "hash_embeddings",
    ("hash_embeddings", "rows"): "num_buckets",
    ("optimizer", "rates"): "lr_multipliers",
}
"""By the section that holds a key, and the key: its present name."""
RENAMED_KINDS = {("model", "table"): "fitted_ngram"}
"""By the section whose kind it is, and the kind."""


def modernise(data: Any, section: str = "") -> Any:
    """Return plain data with the present names of its keys.

    Args:
        data: mappings, sequences and values.
        section: the key that holds them.
    """
    if isinstance(data, list | tuple):
        return type(data)(modernise(value, section) for value in data)
    if not isinstance(data, Mapping):
        return data
    renamed = {}
    for key, value in data.items():
        name = RENAMED.get((section, key), key)
        # Of a key that is given under both names the present one stands.
        if name == key or name not in data:
            renamed[name] = modernise(value, str(name))
    kind = renamed.get("kind")
    if isinstance(kind, str) and (section, kind) in RENAMED_KINDS:
        renamed["kind"] = RENAMED_KINDS[section, kind]
    return renamed


def modern_path(path: str) -> str:
    """Return a dotted path with the present names of its parts."""
    parts: list[str] = []
    for part in path.split("."):
        parts.append(RENAMED.get((parts[-1] if parts else "", part), part))
    return ".".join(parts)
