"""Import released weights from other projects' formats, and export to ``transformers``.

::

    lm = bytelm.interop.import_official("facebook/blt-1b", "facebook/blt-entropy")
    lm = bytelm.interop.import_hf("itazap/blt-1b-hf")
    bytelm.interop.export_hf(lm, "folder")   # BltForCausalLM.from_pretrained("folder")

Tensors are copied one by one, so importing takes no more memory than the model; ``convert_*`` write
a checkpoint directly and hold one tensor at a time. Values are never changed: an export followed by
an import gives the same bits.
"""

from functools import reduce
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from bytelm import codec
from bytelm.checkpoint import (
    MODEL,
    SCORER,
    CheckpointConfig,
    check_finite,
    make_ready,
    write_config,
)
from bytelm.config import BLTConfig, ModelDescription, TransformerConfig
from bytelm.errors import ConfigError
from bytelm.interop import huggingface, official
from bytelm.interop.names import NameMap, Naming, blt_names, part_sizes, scorer_names
from bytelm.interop.sources import ENTROPY_FOLDER, find_folder
from bytelm.interop.tokenizer import tokenizer_files
from bytelm.interop.weights import SAFETENSORS, Assembly, Entry, open_weights, write_tensors
from bytelm.language_model import LanguageModel
from bytelm.lm import PatchedLM, build_lm
from bytelm.model.transformer import Transformer
from bytelm.storage import at_home, atomic_folder, check_absent, write_json

__all__ = [
    "convert_hf",
    "convert_official",
    "export_hf",
    "import_hf",
    "import_official",
    "patch_lengths",
]

Source = str | PathLike[str]


class _Imported(NamedTuple):
    """Description of a model in another format, whose weights have not been read yet."""

    config: CheckpointConfig
    module: PatchedLM
    """The model on the meta device."""
    blt: Assembly
    scorer: Assembly | None

    def load(self) -> LanguageModel:
        """Load the weights into memory, in fp32 on the CPU, and return the model."""
        self.blt.fill(self.module.blt)
        if self.scorer is not None:
            self.scorer.fill(_scorer_transformer(self.module))
        return LanguageModel(make_ready(self.module, "auto"), self.config)

    def convert(self, out: Path) -> CheckpointConfig:
        """Write a checkpoint, tensor by tensor, in the precision of the files."""
        with atomic_folder(out) as folder:
            write_config(folder, self.config)
            self.blt.write(folder / MODEL)
            if self.scorer is not None:
                self.scorer.write(folder / SCORER, prefix="transformer.")
        return self.config


def _scorer_transformer(module: PatchedLM) -> Transformer:
    transformer = getattr(module.scorer, "transformer", None)
    assert isinstance(transformer, Transformer)
    return transformer


def import_official(blt: Source, entropy: Source | None = None) -> LanguageModel:
    """Load weights in the format of facebookresearch/blt.

    Args:
        blt: folder with ``config.json`` and ``model.safetensors``, or ``params.json`` and
            ``consolidated.pth``; or the name of such a Hub repository.
        entropy: the same for the entropy model; ``None`` for ``entropy_model`` within ``blt``.

    Raises:
        CheckpointError: a folder is not in that format, its weights do not fit the configuration,
            or the configuration has options that bytelm does not support; or a weight is NaN or
            infinite.
    """
    return _open_official(blt, entropy).load()


def convert_official(
    blt: Source, out: str | PathLike[str], entropy: Source | None = None
) -> CheckpointConfig:
    """Convert weights in the format of facebookresearch/blt to a checkpoint folder.

    Args:
        blt: as in :func:`import_official`.
        out: folder to create.
        entropy: as in :func:`import_official`.

    Raises:
        CheckpointError: as :func:`import_official`, or ``out`` exists or cannot be written.
    """
    check_absent(at_home(out))
    return _open_official(blt, entropy).convert(at_home(out))


def import_hf(source: Source) -> LanguageModel:
    """Load weights in the format of ``transformers``.

    Args:
        source: folder that ``BltForCausalLM.save_pretrained`` wrote, or the name of a Hub
            repository.

    Raises:
        CheckpointError: as :func:`import_official`.
    """
    return _open_hf(source).load()


def convert_hf(source: Source, out: str | PathLike[str]) -> CheckpointConfig:
    """Convert weights in the format of ``transformers`` to a checkpoint folder.

    Args:
        source: as in :func:`import_hf`.
        out: folder to create.

    Raises:
        CheckpointError: as :func:`import_hf`, or ``out`` exists or cannot be written.
    """
    check_absent(at_home(out))
    return _open_hf(source).convert(at_home(out))


def export_hf(
    lm: LanguageModel, out: str | PathLike[str], *, patch_in_forward: bool = True
) -> None:
    """Write a model and its tokenizer for ``BltForCausalLM.from_pretrained``.

    ``transformers`` finds patches by itself only with an entropy rule and a transformer as scorer.
    With ``patch_in_forward=False`` a model with any other rule or scorer, such as an n-gram scorer,
    is exported without it, and :func:`patch_lengths` must be passed to each forward pass; without
    them, ``transformers`` would make every byte a patch.

    Args:
        lm: the model.
        out: folder to create.
        patch_in_forward: whether ``transformers`` is to find the patches.

    Raises:
        ConfigError: ``transformers`` cannot run such a model; the message names the options.
        CheckpointError: ``out`` exists or cannot be written, or a weight is NaN or infinite.
    """
    check_absent(at_home(out))
    config, (blt, scorer) = huggingface.describe(lm.config, patch_in_forward=patch_in_forward)
    assert isinstance(lm.module, PatchedLM)
    if lm.module.patcher.is_learned:
        raise ConfigError("a learned patching rule cannot be exported: transformers has none")
    entries = _split(lm.module.blt, blt_names(blt, huggingface.NAMING))
    if scorer is not None:
        names = scorer_names(scorer, huggingface.NAMING)
        entries |= _split(_scorer_transformer(lm.module), names)
    # transformers loads all weights in one dtype; the entropy model must not lose precision.
    widest = reduce(torch.promote_types, (entry.dtype for entry in entries.values()))
    config["dtype"] = str(widest).removeprefix("torch.")
    with atomic_folder(at_home(out), record=False) as folder:
        write_json(folder / huggingface.CONFIG, config)
        for name, contents in tokenizer_files().items():
            write_json(folder / name, contents)
        write_tensors(folder / SAFETENSORS, entries)


def patch_lengths(lm: LanguageModel, text: codec.Text) -> Int[Tensor, "1 patches"]:
    """Return the patch lengths of one document, as ``BltForCausalLM`` takes them.

    They are those of the ids BOS and the bytes of the text, which is to be the only document of its
    row. The last is 0 if the byte after the text starts a patch::

        model(ids, patch_lengths=patch_lengths(lm, text), use_cache=False).logits

    Raises:
        ConfigError: the model is not a BLT.
    """
    if not isinstance(lm.module, PatchedLM):
        raise ConfigError("only a BLT has patches: load one")
    ids = torch.from_numpy(codec.encode(text))[None].to(lm.device)
    with torch.inference_mode():
        scores = None
        if lm.module.patcher.needs_entropies:
            scores = torch.from_numpy(lm.entropies(text))[None].to(lm.device)
        states = lm.module.encoder_states(ids) if lm.module.patcher.needs_states else None
        next_boundary = lm.module.patcher.next_boundary(ids, scores, states=states)[0]
        starts = torch.cat((next_boundary.new_ones(1), next_boundary)).nonzero().flatten()
    return starts.diff(append=starts.new_tensor([ids.shape[1]])).clone()[None]


def _split(module: torch.nn.Module, names: NameMap) -> dict[str, Entry]:
    """Return the tensors of a module in the parts, and under the names, of another project."""
    entries = {}
    for ours, tensor in module.state_dict().items():
        parts = tensor.split(part_sizes(names[ours], len(tensor)))
        for theirs, part in zip(names[ours], parts, strict=True):
            check_finite(ours, part, "the model")
            entries[theirs] = Entry(tuple(part.shape), part.dtype, lambda part=part: [part])
    return entries


def _open_official(blt: Source, entropy: Source | None) -> _Imported:
    folder = find_folder(blt)
    inner = folder / ENTROPY_FOLDER
    entropy_folder = find_folder(entropy) if entropy else inner if inner.is_dir() else None
    description = official.read_description(folder, entropy_folder)
    return _open(description, official.NAMING, folder, entropy_folder, f"{blt} (official format)")


def _open_hf(source: Source) -> _Imported:
    folder = find_folder(source)
    description = huggingface.read_description(folder)
    where = f"{source} (format of transformers)"
    return _open(description, huggingface.NAMING, folder, folder, where)


def _open(
    description: ModelDescription,
    naming: Naming,
    folder: Path,
    scorer_folder: Path | None,
    source: str,
) -> _Imported:
    """Match the weights in one or two folders with a description."""
    assert isinstance(description.model, BLTConfig)
    with torch.device("meta"):
        module = build_lm(description)
    assert isinstance(module, PatchedLM)
    config = CheckpointConfig(**dict(description), training={"imported_from": source})
    names = blt_names(description.model, naming)
    weights = open_weights(folder)
    if description.scorer is None:
        return _Imported(config, module, Assembly(module.blt, names, weights, folder), None)

    assert isinstance(description.scorer.model, TransformerConfig)
    assert scorer_folder is not None
    in_scorer = scorer_names(description.scorer.model, naming)
    is_shared = scorer_folder == folder
    others, scorer_others = (in_scorer, names) if is_shared else ({}, {})
    blt = Assembly(module.blt, names, weights, folder, others)
    scorer_weights = weights if is_shared else open_weights(scorer_folder)
    transformer = _scorer_transformer(module)
    scorer = Assembly(transformer, in_scorer, scorer_weights, scorer_folder, scorer_others)
    return _Imported(config, module, blt, scorer)
