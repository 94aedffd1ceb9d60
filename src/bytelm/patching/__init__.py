"""Patching rules, the :class:`Patches` of a batch, and calibration of thresholds."""

from bytelm.patching.boundaries import PADDING, Patches, build_patches, row_positions
from bytelm.patching.calibration import (
    PatchSample,
    PatchStatistics,
    calibrate,
    patch_statistics,
)
from bytelm.patching.patcher import Patcher, PatcherState, build_patcher
from bytelm.patching.rules import (
    ByteRule,
    EntropyRule,
    Rule,
    Seen,
    SpaceRule,
    StatefulRule,
    StaticRule,
    build_rule,
    register_rule,
)
from bytelm.patching.scorer import Scorer, ScorerState, entropy

__all__ = [
    "PADDING",
    "ByteRule",
    "EntropyRule",
    "PatchSample",
    "PatchStatistics",
    "Patcher",
    "PatcherState",
    "Patches",
    "Rule",
    "Scorer",
    "ScorerState",
    "Seen",
    "SpaceRule",
    "StatefulRule",
    "StaticRule",
    "build_patcher",
    "build_patches",
    "build_rule",
    "calibrate",
    "entropy",
    "patch_statistics",
    "register_rule",
    "row_positions",
]
