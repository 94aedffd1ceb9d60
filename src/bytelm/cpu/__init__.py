"""The CPU's fast paths, applied to a model from outside."""

import torch

from bytelm.cpu import compiling
from bytelm.cpu.fusing import fuse, unfuse
from bytelm.cpu.int8 import Int8Linear, quantize
from bytelm.cpu.layout import arrange

__all__ = ["Int8Linear", "arrange", "compile_kernels", "fuse", "quantize", "unfuse"]


def compile_kernels(device: torch.device) -> None:
    """Compile the kernels of steps of several requests, if they will be used, so that none waits.

    That takes some 20 s the first time on a computer, and less than 1 s in each later process.
    """
    if compiling.is_worth_it(torch.empty(0, device=device)):
        compiling.kernels().warm_up()
