"""Safetensors files that the ranks of a sharded model write and read together.

Tensors are sharded by rows, and the rows of a rank are a contiguous part of the file. Each rank
writes and reads its own, so no rank needs memory for a whole tensor, and the file is the one that a
single process would have written: every tool reads it, and any number of ranks. ::

    model.safetensors   header | a: rows of rank 0, rows of rank 1 | b: rows of rank 0, ...
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bytelm.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of types in the format."""


class Part(NamedTuple):
    """Rows of a tensor that this rank holds; all of it if it is not sharded."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    begin: int
    """First row."""
    rows: Tensor
    is_first: bool
    """Whether other ranks with the same rows, if there are any, have higher numbers."""


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is distributed over ranks."""
    # Importing the module takes longer than the rest of a short command, and there is no such
    # tensor before something else has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def part_of(tensor: Tensor) -> Part:
    """Return the part of a tensor that this rank holds."""
    if not is_sharded(tensor):
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        return Part(tuple(tensor.shape), 0, tensor.detach(), is_first)
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None
    begin, is_first = 0, True
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard(0):
            # As torch.chunk: the last ranks may have fewer rows, or none.
            size = -(-tensor.shape[0] // tensor.device_mesh.size(axis))
            begin = min(coordinates[axis] * size, tensor.shape[0])
        else:
            assert placement.is_replicate(), placement
            is_first = is_first and coordinates[axis] == 0
    return Part(tuple(tensor.shape), begin, tensor.to_local().detach(), is_first)


def write_parts(path: Path, parts: Mapping[str, Part], *, has_header: bool) -> None:
    """Write this rank's parts of all tensors; the file is complete when all ranks have.

    Args:
        path: the file, which other ranks may have begun.
        parts: from :func:`part_of`, by name; names, shapes and types are the same on all ranks.
        has_header: whether this rank writes the header.

    Raises:
        OSError: the file cannot be written.
    """
    header, offsets = _layout(parts)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if has_header:
            _write(descriptor, header, 0)
        for name, part in parts.items():
            if part.is_first and part.rows.numel():
                rows = part.rows.cpu().contiguous()
                begin = offsets[name] + part.begin * _row_bytes(part)
                _write(descriptor, rows.flatten().view(torch.uint8).numpy(), begin)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _row_bytes(part: Part) -> int:
    row = part.shape[1:] if part.shape else ()
    return torch.Size(row).numel() * part.rows.element_size()


def _layout(parts: Mapping[str, Part]) -> tuple[bytes, dict[str, int]]:
    """Return the header, and where in the file each tensor begins."""
    names = list(DTYPES)
    order = sorted(parts, key=lambda name: (names.index(parts[name].rows.dtype), name))
    header, at = {}, 0
    for name in order:
        part = parts[name]
        end = at + torch.Size(part.shape).numel() * part.rows.element_size()
        dtype, shape = DTYPES[part.rows.dtype], list(part.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    offsets = {name: begin + one["data_offsets"][0] for name, one in header.items()}
    return len(text).to_bytes(8, "little") + text, offsets


def _write(descriptor: int, data: Any, at: int) -> None:
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(descriptor, left, at)
        at, left = at + written, left[written:]


def stored_names(path: Path) -> list[str]:
    """Return the names of the tensors in a file.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def read_parts(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's parts of tensors from a file, and read nothing else of it.

    Args:
        path: the file.
        tensors: tensors of the same shapes, by their name in the file.

    Raises:
        CheckpointError: the file is damaged, or lacks one of the tensors or has it in another
            shape.
    """
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            known = set(file.keys())
            for name, tensor in tensors.items():
                part = part_of(tensor)
                if name not in known:
                    raise CheckpointError(f"{path} lacks {name}: use another checkpoint")
                stored = file.get_slice(name)
                if tuple(stored.get_shape()) != part.shape:
                    raise CheckpointError(
                        f"{path}: {name} has shape {stored.get_shape()}, not {list(part.shape)}: "
                        "use another checkpoint"
                    )
                if not part.shape:
                    part.rows.copy_(file.get_tensor(name))
                elif part.rows.numel():
                    part.rows.copy_(stored[part.begin : part.begin + len(part.rows)])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
