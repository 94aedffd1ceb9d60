"""The CPU's fast paths, applied to a model from outside."""

from bytelm.cpu.fusing import fuse, unfuse
from bytelm.cpu.int8 import Int8Linear, quantize
from bytelm.cpu.layout import arrange

__all__ = ["Int8Linear", "arrange", "fuse", "quantize", "unfuse"]
