"""Read other projects' weights tensor by tensor, with only one part in memory at a time.

Safetensors (one file, or shards with an index) and consolidated ``.pth`` files are supported. A
``.pth`` file is a pickle: only tensors and plain containers are allowed in it, so code in it is
refused, not run.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bytelm.checkpoint import check_finite
from bytelm.errors import CheckpointError
from bytelm.interop.names import NameMap, part_sizes

SAFETENSORS, INDEX, PTH = "model.safetensors", "model.safetensors.index.json", "consolidated.pth"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Supported dtypes of weights, with their names in safetensors."""
_BUFFERS = ("freqs_cis", "inv_freq")
"""Suffixes of the names of rotary factors, which some files hold; models compute them."""


class Entry(NamedTuple):
    """Tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]
    """Reads the tensor, whole or in parts stacked along the first axis."""


Entries = Mapping[str, Entry]


def open_weights(folder: Path) -> Entries:
    """Return the tensors in a folder, by name, without reading them.

    Raises:
        CheckpointError: there is no file of weights, or it is damaged or holds more than tensors.
    """
    if (folder / SAFETENSORS).is_file():
        return _open_safetensors(folder / SAFETENSORS)
    if (folder / INDEX).is_file():
        return _open_shards(folder / INDEX)
    if (folder / PTH).is_file():
        return _open_pickle(folder / PTH)
    raise CheckpointError(
        f"{folder} holds no weights: one of {SAFETENSORS}, {INDEX} or {PTH} is expected"
    )


def _open_safetensors(path: Path) -> dict[str, Entry]:
    codes = {code: dtype for dtype, code in DTYPES.items()}
    try:
        file = safe_open(path, framework="pt")
        entries = {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(name)
            dtype = codes.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{path}: {name} is stored as {part.get_dtype()}, which bytelm does not read: "
                    "convert it to F32, BF16 or F16"
                )
            entries[name] = Entry(tuple(part.get_shape()), dtype, _reader(file, name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
    return entries


def _reader(file: safe_open, name: str) -> Callable[[], list[Tensor]]:
    return lambda: [file.get_tensor(name)]


def _open_shards(index: Path) -> dict[str, Entry]:
    try:
        placed = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = sorted(set(placed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from None
    entries: dict[str, Entry] = {}
    for shard in shards:
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise CheckpointError(f"{index.parent / shard} is missing: download it again")
        entries |= _open_safetensors(index.parent / shard)
    return entries


def _open_pickle(path: Path) -> dict[str, Entry]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path} holds more than tensors and was not opened, since it could run code: {reason}"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged or not a torch file: {error}") from None
    for key in ("model", "state_dict"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict) or not all(isinstance(t, Tensor) for t in data.values()):
        raise CheckpointError(f"{path} does not hold named tensors: a state dict is expected")
    # Parameters are tensors that require gradients.
    data = {str(name): tensor.detach() for name, tensor in data.items()}
    for name, tensor in data.items():
        if tensor.dtype not in DTYPES and not name.endswith(_BUFFERS):
            raise CheckpointError(
                f"{path}: {name} is stored as {tensor.dtype}, which bytelm does not read: convert "
                "it to float32, bfloat16 or float16"
            )
    return {
        name: Entry(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: [tensor])
        for name, tensor in data.items()
    }


class Assembly:
    """Tensors of a module, assembled from the parts in another project's files.

    Args:
        module: the module, possibly on the meta device.
        names: names of its tensors -> names of their parts.
        entries: tensors in the files.
        where: the folder, for messages.
        others: names of other models' tensors in ``entries``, in the form of ``names``.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """

    def __init__(
        self,
        module: nn.Module,
        names: NameMap,
        entries: Entries,
        where: Path,
        others: NameMap | None = None,
    ) -> None:
        self.shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
        assert self.shapes.keys() == names.keys(), self.shapes.keys() ^ names.keys()
        self._names = names
        self._entries = entries
        self._where = where
        both = [*names.values(), *(others or {}).values()]
        known = {theirs for parts in both for theirs in parts}
        problems = [
            f"{name} is unknown"
            for name in entries
            if name not in known and not name.endswith(_BUFFERS)
        ]
        for ours, parts in names.items():
            size, *rest = self.shapes[ours]
            for theirs, part in zip(parts, part_sizes(parts, size), strict=True):
                expected = (part, *rest)
                if theirs not in entries:
                    problems.append(f"{theirs} is missing")
                elif entries[theirs].shape != expected:
                    found = list(entries[theirs].shape)
                    problems.append(f"{theirs} has shape {found}, not {list(expected)}")
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointError(
                f"the weights in {where} do not fit its configuration: "
                f"{'; '.join(sorted(problems)[:3])}{more}"
            )

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor: the widest dtype of its parts."""
        return reduce(torch.promote_types, (self._entries[p].dtype for p in self._names[name]))

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield the parts of a tensor, in order.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        for theirs in self._names[name]:
            for part in self._entries[theirs].parts():
                check_finite(theirs, part, self._where)
                yield part.to(self.dtype(name))

    def tensor(self, name: str) -> Tensor:
        """Return an assembled tensor."""
        tensor = torch.empty(self.shapes[name], dtype=self.dtype(name))
        sizes = part_sizes(self._names[name], len(tensor))
        for target, part in zip(tensor.split(sizes), self.parts(name), strict=True):
            target.copy_(part)
        return tensor

    def fill(self, module: nn.Module) -> None:
        """Load the weights of a module that was built on the meta device."""
        module.load_state_dict({name: self.tensor(name) for name in self.shapes}, assign=True)

    def write(self, path: Path, prefix: str = "") -> None:
        """Write the tensors to a safetensors file, one part at a time, under prefixed names.

        Raises:
            OSError: the file cannot be written.
        """
        write_tensors(
            path,
            {
                prefix + name: Entry(shape, self.dtype(name), lambda name=name: self.parts(name))
                for name, shape in self.shapes.items()
            },
        )


def write_tensors(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write a safetensors file with one part in memory at a time.

    The format is eight bytes with the length of a JSON header, the header, padded with spaces to a
    multiple of eight bytes, and the tensors one after another.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype, _) in entries.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for _, _, parts in entries.values():
            for part in parts():
                file.write(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
