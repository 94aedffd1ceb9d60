"""Patching: rules, the :class:`Patches` they make, and thresholds for a wanted patch size."""

from bytelm.patching.boundaries import PADDING, Patches, build_patches, row_positions
from bytelm.patching.rules import (
    ByteRule,
    Context,
    EntropyRule,
    Patcher,
    PatcherStream,
    Rule,
    SpaceRule,
    StaticRule,
)

__all__ = [
    "PADDING",
    "ByteRule",
    "Context",
    "EntropyRule",
    "Patcher",
    "PatcherStream",
    "Patches",
    "Rule",
    "SpaceRule",
    "StaticRule",
    "build_patches",
    "row_positions",
]
