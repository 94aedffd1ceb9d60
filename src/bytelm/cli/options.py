"""Parse the values of options: patching rules and durations."""

import re

from bytelm.config import RULES, PatchingConfig, import_kinds, nearest, parse
from bytelm.errors import ConfigError


def build_rule(
    kind: str,
    threshold: float | None,
    increase: float | None,
    length: int | None,
    max_length: int | None,
    own: PatchingConfig | None = None,
) -> PatchingConfig:
    """Return a rule from options.

    Args:
        kind: kind of the rule.
        threshold: of an entropy or combined rule, in nats.
        increase: of a monotonic or combined rule, in nats.
        length: of a static rule, in bytes.
        max_length: longest patch, in bytes.
        own: rule whose values replace options that are ``None``, and whose other fields are kept
            if it is of the same kind.

    Raises:
        ConfigError: the kind is unknown, or the rule lacks an option.
    """
    if kind not in RULES.nodes:
        import_kinds()
    if kind not in RULES.nodes:
        known = list(RULES.nodes)
        raise ConfigError(
            f"--rule {kind}: unknown rule{nearest(kind, known)} (known: {', '.join(known)})"
        )
    node = RULES.nodes[kind]
    options = {
        "threshold": threshold,
        "increase": increase,
        "length": length,
        "max_length": max_length,
    }
    values = {"length": 4} if kind == "static" else {}
    if own is not None and type(own) is node:
        values = own.model_dump()
    elif own is not None:
        values |= {k: v for k, v in own.model_dump(exclude_none=True).items() if k in options}
    values |= {k: v for k, v in options.items() if v is not None}
    values = {k: v for k, v in values.items() if k in node.model_fields}
    if kind == "combined" and "increase" not in values:
        raise ConfigError("the combined rule needs --increase")
    return parse(node, values, f"the {kind} rule")


def seconds(text: str) -> float:
    """Return the seconds of a duration such as ``90s``, ``9m`` or ``2h``.

    Raises:
        ConfigError: not a duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text)
    if not match:
        raise ConfigError(f"time limit {text!r} must look like 90s, 9m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
