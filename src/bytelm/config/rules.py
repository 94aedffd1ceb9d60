"""Patching rules from a kind and single options, as commands and ``LanguageModel.patch`` take."""

from typing import Any

from bytelm.config.kinds import import_kinds
from bytelm.config.patching import RULES, PatchingConfig
from bytelm.config.reading import nearest, parse
from bytelm.errors import ConfigError

RULE_OPTIONS = ("threshold", "increase", "length", "max_length")
"""Options that :func:`named_rule` takes."""
STATIC_LENGTH = 4
"""Bytes in a static patch unless a length is given."""


def named_rule(kind: str, own: PatchingConfig | None = None, **options: Any) -> PatchingConfig:
    """Return the rule of a kind.

    Args:
        kind: kind of the rule, such as ``entropy``; also a registered one.
        own: rule whose values replace options that are ``None``, and whose other fields are kept
            if it is of the same kind.
        options: ``threshold``, ``increase`` (both in nats), ``length`` and ``max_length`` (both in
            bytes); ``None`` if not given.

    Raises:
        ConfigError: the kind is unknown, the rule lacks an option, or has no such option.
    """
    if kind not in RULES.nodes:
        import_kinds()
    if kind not in RULES.nodes:
        known = list(RULES.nodes)
        raise ConfigError(
            f"unknown patching rule {kind!r}{nearest(kind, known)} (known: {', '.join(known)})"
        )
    node = RULES.nodes[kind]
    values = {"length": STATIC_LENGTH} if kind == "static" else {}
    if own is not None and type(own) is node:
        values = own.model_dump()
    elif own is not None:
        values |= {k: v for k, v in own.model_dump(exclude_none=True).items() if k in options}
    given = {k: v for k, v in options.items() if v is not None}
    if unknown := [name for name in given if name not in node.model_fields]:
        raise ConfigError(f"the {kind} rule has no {unknown[0].replace('_', ' ')}: leave it out")
    values |= given
    values = {k: v for k, v in values.items() if k in node.model_fields}
    return parse(node, values, f"the {kind} rule")
