"""Values of options: patching rules, durations."""

import re
from typing import Literal

from bytelm.config import (
    BytePatching,
    CombinedPatching,
    EntropyPatching,
    MonotonicPatching,
    PatchingConfig,
    SpacePatching,
    StaticPatching,
    parse,
)
from bytelm.errors import ConfigError

RULES: dict[str, type[PatchingConfig]] = {
    "byte": BytePatching,
    "static": StaticPatching,
    "space": SpacePatching,
    "entropy": EntropyPatching,
    "monotonic": MonotonicPatching,
    "combined": CombinedPatching,
}
Rule = Literal["byte", "static", "space", "entropy", "monotonic", "combined"]


def build_rule(
    kind: str,
    threshold: float | None,
    increase: float | None,
    length: int | None,
    max_length: int | None,
    own: PatchingConfig | None = None,
) -> PatchingConfig:
    """A rule from options; what they leave out is taken from ``own`` where that has it."""
    node = RULES[kind]
    options = {
        "threshold": threshold,
        "increase": increase,
        "length": length,
        "max_length": max_length,
    }
    values = {"length": 4} if kind == "static" else {}
    if own is not None:
        values |= {k: v for k, v in own.model_dump(exclude_none=True).items() if k in options}
    values |= {k: v for k, v in options.items() if v is not None}
    values = {k: v for k, v in values.items() if k in node.model_fields}
    if kind == "combined" and "increase" not in values:
        raise ConfigError("the combined rule needs --increase")
    return parse(node, values, f"the {kind} rule")


def seconds(text: str) -> float:
    """Seconds of a duration such as ``90s``, ``9m`` or ``2h``.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text)
    if not match:
        raise ConfigError(f"time limit {text!r} must look like 90s, 9m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
