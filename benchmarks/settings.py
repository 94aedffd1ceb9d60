"""What a run of the benchmarks is asked to do."""

from dataclasses import dataclass
from typing import Literal

SUITES = ("model", "cross-attention", "generation", "engine", "memory", "scorer", "data")

Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Settings:
    """Options that all suites share."""

    device: Device = "cpu"
    precision: Precision = "float32"
    """Of ours; bfloat16 is autocast. Theirs always runs in float32."""
    threads: int = 1
    repeats: int = 5
    quick: bool = False
    """Small models and sizes: to see that everything runs, not to learn anything."""
    theirs_up_to: int = 8192
    """Longest row that the other implementation is given."""
    their_bytes: int = 16
    """Bytes that the other implementation generates."""
