"""The CPU's fast paths, applied to a model from outside."""

from bytelm.cpu.fusing import fuse, unfuse

__all__ = ["fuse", "unfuse"]
