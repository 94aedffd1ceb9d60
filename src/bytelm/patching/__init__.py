"""Patching: rules, the :class:`Patches` they make, and thresholds for a wanted patch size."""

from bytelm.patching.boundaries import PADDING, Patches, build_patches, row_positions
from bytelm.patching.calibration import (
    PatchSample,
    PatchStatistics,
    calibrate,
    patch_statistics,
)
from bytelm.patching.rules import (
    ByteRule,
    Context,
    EntropyRule,
    Patcher,
    PatcherStream,
    Rule,
    SpaceRule,
    StaticRule,
    build_patcher,
)

__all__ = [
    "PADDING",
    "ByteRule",
    "Context",
    "EntropyRule",
    "Patcher",
    "PatcherStream",
    "PatchSample",
    "PatchStatistics",
    "Patches",
    "Rule",
    "SpaceRule",
    "StaticRule",
    "build_patcher",
    "build_patches",
    "calibrate",
    "patch_statistics",
    "row_positions",
]
