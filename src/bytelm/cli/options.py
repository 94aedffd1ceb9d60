"""Options that several commands share, and the values of options: patching rules and durations."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from bytelm.config import PatchingConfig
from bytelm.config.rules import named_rule
from bytelm.errors import ConfigError

Checkpoint = Annotated[
    Path, typer.Argument(help="Folder of a checkpoint, or of a training run (its newest is used).")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for CUDA if available.")]
Precision = Annotated[
    Literal["auto", "stored", "float32", "bfloat16", "int8"],
    typer.Option(
        help="Precision of the weights; auto: float32 on the CPU, as stored elsewhere; int8: on "
        "the CPU, generates faster (needs numba)."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Threads to compute with. (default: OMP_NUM_THREADS, or the fastest number in a "
        "measurement of half a second)",
    ),
]


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
    if kind == "combined" and increase is None and getattr(own, "increase", None) is None:
        raise ConfigError("the combined rule needs --increase")
    return named_rule(
        kind, own, threshold=threshold, increase=increase, length=length, max_length=max_length
    )


def seconds(text: str) -> float:
    """Return the seconds of a duration such as ``90s``, ``9m`` or ``2h``.

    Raises:
        ConfigError: not a duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text)
    if not match:
        raise ConfigError(f"time limit {text!r} must look like 90s, 9m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def step_range(text: str) -> tuple[int, int]:
    """Return the first and the last of some steps, such as of ``10-12``; or one step.

    Raises:
        ConfigError: the text is no such range.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < first <= last:
        raise ConfigError(f"--profile {text!r} is no range of steps: write 10, or 10-12")
    return first, last
