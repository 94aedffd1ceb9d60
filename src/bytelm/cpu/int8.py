"""Weights as integers of 8 bits, for decoding on a CPU, which is bound by reading weights.

A matrix ``W`` is kept as ``scale * Q``, with an integer ``Q`` in -127..127 and a scale for each
output, ``max |W| / 127``; activations and sums stay in fp32. Products with few rows run in a kernel
that widens the integers in registers, so a byte reads a quarter of the memory. Each row is computed
by itself: results do not depend on the size of a batch. Products with many rows, as of prompts, are
bound by arithmetic: they widen the matrix first.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm.cpu.compiling import has_numba, kernels
from bytelm.errors import ConfigError

TILE = 64
"""Outputs that are computed at once."""
MIN_SIZE = 2**15
"""Entries from which a matrix is worth quantising."""
MAX_ROWS = 32
"""Rows up to which the kernel is used."""


class Int8Weight:
    """A quantised matrix ``[outputs, inputs]`` on the CPU.

    Args:
        tiles: the integers, in tiles of outputs.
        scale: scale of each output.
    """

    def __init__(
        self, tiles: Int[Tensor, "tiles inputs tile"], scale: Float[Tensor, " outputs"]
    ) -> None:
        self.shape = (len(scale), tiles.shape[1])
        self.is_cpu = True
        self._tiles, self._scale = tiles, scale
        self.arrays = tiles.numpy(), scale.numpy()
        """The same, as the kernels take a matrix."""

    def __call__(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """Return ``x @ W.T``."""
        if len(x) > MAX_ROWS:
            return x @ self.widen()
        out = x.new_empty(len(x), self.shape[0])
        self.multiplication(x.contiguous(), out)()
        return out

    def multiplication(
        self, x: Float[Tensor, "rows inputs"], out: Float[Tensor, "rows outputs"]
    ) -> Callable[[], None]:
        """Return a function that writes ``x @ W.T`` to ``out``, with whatever ``x`` then holds."""
        kernel, arguments = kernels().add_int8, (x.detach().numpy(), *self.arrays, out.numpy())

        def multiply() -> None:
            out.zero_()
            kernel(*arguments)

        return multiply

    def widen(self) -> Float[Tensor, "inputs outputs"]:
        """Return the transposed matrix in fp32."""
        columns = self._tiles.transpose(0, 1).flatten(1)[:, : len(self._scale)]
        return columns.float().mul_(self._scale)


class Int8Linear(nn.Module):
    """A linear layer whose matrix is quantised; for inference on a CPU."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1) / 127
        integers = (weight / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8)
        padded = nn.functional.pad(integers, (0, 0, 0, -len(integers) % TILE))
        self.register_buffer("tiles", padded.unflatten(0, (-1, TILE)).transpose(1, 2).contiguous())
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.out_features, self.in_features = weight.shape

    @property
    def matrix(self) -> Int8Weight:
        """The matrix."""
        tensors: Any = (self.tiles, self.scale)
        return Int8Weight(*tensors)

    def forward(self, x: Float[Tensor, "*shape inputs"]) -> Float[Tensor, "*shape outputs"]:
        out = self.matrix(x.reshape(-1, self.in_features).float()).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def quantize(model: nn.Module) -> None:
    """Quantise the linear layers of a model's blocks and its wide projections, in place.

    Embeddings and the layer that computes the logits stay as they are. Fuse the model afterwards.

    Raises:
        ConfigError: the model is not on the CPU, or ``numba`` is not installed.
    """
    if any(not parameter.is_cpu for parameter in model.parameters()):
        raise ConfigError("precision 'int8' is for the CPU: use another one, or device 'cpu'")
    _check_numba()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            # A subclass may compute something else.
            is_plain = type(child) is nn.Linear and name != "output"
            if is_plain and child.get_parameter("weight").numel() >= MIN_SIZE:
                setattr(module, name, Int8Linear(child))
    kernels().warm_up(is_int8=True)


def _check_numba() -> None:
    if not has_numba():
        raise ConfigError("precision 'int8' needs the package numba: pip install 'bytelm[int8]'")
