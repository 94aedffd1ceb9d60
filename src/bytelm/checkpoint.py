"""Checkpoints: folders that are complete by themselves, written whole or not at all.

::

    config.json          format, versions, model, patching, scorer, how it was trained
    model.safetensors    weights
    scorer.safetensors   weights of the scorer, if the patching rule needs one
    tokenizer.json       merges, if the model reads tokens
    files.json           size and SHA-256 of every file above, written last

A kill or a full disk at any moment of a save leaves no folder (see :mod:`bytelm.storage`). Nothing
is ever unpickled. A training run adds its own files to a step's folder (see
:mod:`bytelm.training.state`).
"""

import math
import re
from collections.abc import Container
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bytelm import cpu
from bytelm.config import SCORERS, ModelDescription, ScorerConfig, kind_of, open_node, parse
from bytelm.errors import BytelmError, CheckpointError, ConfigError
from bytelm.layout import CONFIG, MODEL, SCORER, TOKENIZER, check_checkpoint, find_checkpoint
from bytelm.layout import saved_steps as saved_steps
from bytelm.lm import ByteLM, CausalLM, ScorerLM, build_lm
from bytelm.model.transformer import Transformer
from bytelm.patching import Scorer
from bytelm.scoring import build_scorer
from bytelm.storage import (
    atomic_folder,
    folder_fingerprint,
    read_json,
    write_json,
)
from bytelm.tokens import load_tokenizer
from bytelm.version import __version__

FORMAT = 1
LmT = TypeVar("LmT", bound=CausalLM)


@open_node
class CheckpointConfig(ModelDescription):
    """Contents of ``config.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = FORMAT
    bytelm: str = __version__
    torch: str = torch.__version__
    training: dict[str, Any] | None = None
    """Record of the training: recipe, steps, FLOPs, and a fingerprint of the data."""


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file.

    Raises:
        OSError: the file cannot be written.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


_OLD_EMBEDDING = re.compile(r"(^|\.)embedding\.(bytes\.)?weight\b")
"""Names of the embedding's weight in checkpoints of earlier versions."""


def load_tensors(
    path: Path, module: nn.Module, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Read tensors from a safetensors file.

    Args:
        path: the file.
        module: the module that the tensors belong to, or whose parameters they are named after
            (``NAME/exp_avg``).
        device: device to load them to.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        tensors = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    known = module.state_dict()
    return {present_name(name, known): tensor for name, tensor in tensors.items()}


def present_name(name: str, known: Container[str]) -> str:
    """Return the present name of a tensor of a checkpoint, which an earlier version may have made.

    Args:
        name: name in the file, which may have more after a slash.
        known: present names of the model's tensors.
    """
    is_known = name.partition("/")[0] in known
    return name if is_known else _OLD_EMBEDDING.sub(r"\1embedding.ids.weight", name)


def check_finite(name: str, tensor: Tensor, where: Path | str, *, allow_inf: bool = False) -> None:
    """Check that no weight is NaN or infinite, in one pass and without copying the tensor.

    Args:
        name: name of the tensor, for the message.
        tensor: the weights; other tensors than floating-point ones pass.
        where: file or folder of the tensor, for the message.
        allow_inf: whether infinity is legal, as in a mask or in the logarithm of a probability.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return
    bounds = [float(bound) for bound in tensor.detach().aminmax()]  # NaN if any weight is
    bad = [x for x in bounds if math.isnan(x) or (math.isinf(x) and not allow_inf)]
    if bad:
        raise CheckpointError(
            f"{where}: the weights {name} hold {'NaN' if math.isnan(bad[0]) else 'infinity'}: the "
            "training diverged or the file is damaged; use an earlier checkpoint"
        )


def write_model(
    folder: Path,
    lm: CausalLM,
    description: ModelDescription,
    training: dict[str, Any] | None = None,
) -> None:
    """Write a model's files into a folder that :func:`atomic_folder` yielded."""
    write_description(folder, lm, description, training)
    for name, module in lm.saved.items():
        save_tensors(folder / f"{name}.safetensors", module.state_dict())


def write_description(
    folder: Path,
    lm: CausalLM,
    description: ModelDescription,
    training: dict[str, Any] | None = None,
) -> None:
    """Write a model's files except those of weights."""
    known = {name: getattr(description, name) for name in ModelDescription.model_fields}
    write_config(folder, CheckpointConfig(**known, training=training))
    if lm.tokenizer is not None:
        lm.tokenizer.save(folder / TOKENIZER)


def write_config(folder: Path, config: CheckpointConfig) -> None:
    """Write a model's configuration into a folder that :func:`atomic_folder` yielded."""
    write_json(folder / CONFIG, config.model_dump(mode="json"))


def save_model(
    folder: Path,
    lm: CausalLM,
    description: ModelDescription,
    training: dict[str, Any] | None = None,
) -> None:
    """Save a model as a checkpoint folder.

    Raises:
        CheckpointError: the folder exists, or cannot be written; or the weights are quantised.
    """
    if any(type(module) is cpu.Int8Linear for module in lm.modules()):
        raise CheckpointError(
            "weights of precision 'int8' are for inference: load the model in another precision "
            "to save it"
        )
    with atomic_folder(folder) as temporary:
        write_model(temporary, lm, description, training)


def read_config(folder: Path) -> CheckpointConfig:
    """Return the configuration of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of an unsupported format version.
    """
    data = read_json(folder / CONFIG)
    if not isinstance(data, dict):
        raise CheckpointError(f"{folder / CONFIG} is damaged: use another checkpoint")
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / CONFIG} has format {data.get('format')!r}, this version of bytelm reads "
            f"{FORMAT}: install the version that made it ({data.get('bytelm', 'unknown')})"
        )
    try:
        return parse(CheckpointConfig, data, str(folder / CONFIG))
    except BytelmError as error:
        raise CheckpointError(str(error)) from None


Precision = Literal["auto", "stored", "float32", "bfloat16", "int8"]
"""Precision of the weights: as stored, converted, or chosen to suit the device (``auto``); ``int8``
(:mod:`bytelm.cpu.int8`) is for inference on the CPU."""


def load_model(
    path: Path, device: str | torch.device = "cpu", precision: Precision = "auto"
) -> tuple[CausalLM, CheckpointConfig]:
    """Load the checkpoint at ``path``, or the newest of the run there, ready for inference.

    Args:
        path: folder of a checkpoint or a run.
        device: device to load the weights to.
        precision: precision of the weights; ``auto`` is fp32 on the CPU, where anything else is
            slow, and as stored elsewhere. A scorer is converted to fp32 unless ``stored`` is
            chosen, so that the patches do not depend on the precision.

    Returns:
        The language model, in evaluation mode and without gradients, and its configuration.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, its weights do not fit its
            configuration, or one is NaN or infinite.
        ConfigError: the precision is unknown.
    """
    folder = find_checkpoint(path)
    check_checkpoint(folder)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER) if config.tokens else None
    with torch.device("meta"):
        lm = build_lm(config, tokenizer=tokenizer)
    for name, module in lm.saved.items():
        _fill(module, folder / f"{name}.safetensors", device)
    return make_ready(lm, precision), config


def make_ready(lm: LmT, precision: Precision) -> LmT:
    """Convert a model's weights in place, make it fast to infer with, and return it.

    Raises:
        ConfigError: the precision is unknown, or ``int8`` and the device is not the CPU.
    """
    set_precision(lm, "float32" if precision == "int8" else precision)
    lm.eval().requires_grad_(False)
    if precision == "int8" and lm.can_predict:
        cpu.quantize(lm.trained)
    for module in lm.saved.values():
        cpu.arrange(module)
    return cpu.fuse(lm)


def set_precision(lm: CausalLM, precision: Precision) -> None:
    """Convert a model's weights in place, and its scorer's to fp32; see :func:`load_model`.

    Raises:
        ConfigError: the precision is unknown.
    """
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise ConfigError(f"precision {precision!r} is not one of {known}")
    if precision == "stored" or not lm.can_predict:
        return
    if precision == "bfloat16":
        lm.trained.bfloat16()
    elif precision == "float32" or lm.device.type == "cpu":
        lm.trained.float()
    for module in lm.saved.values():
        if module is not lm.trained:
            module.float()


def load_scorer(
    path: Path, *, reset_at_newline: bool, device: str | torch.device = "cpu"
) -> tuple[Scorer, ScorerConfig]:
    """Load a checkpoint as a scorer, in fp32, or the scorer of a checkpoint that has one.

    Args:
        path: folder of a checkpoint or a run.
        reset_at_newline: whether a newline begins a new context; ignored for a model with a scorer
            of its own, which was trained with one or the other.
        device: device to load the weights to.

    Returns:
        The scorer, and its configuration.

    Raises:
        CheckpointError: as :func:`load_model`; or the model is not a scorer of bytes with a finite
            window.
    """
    folder = find_checkpoint(path)
    check_checkpoint(folder)
    known = read_config(folder)
    model = known.model if known.scorer is None else known.scorer.model
    if type(model) not in SCORERS.nodes.values():
        raise CheckpointError(
            f"{folder} holds a {kind_of(type(model))} model, not a scorer: name a checkpoint of an "
            f"entropy model ({', '.join(SCORERS.nodes)})"
        )
    if known.tokens:
        raise CheckpointError(
            f"{folder} cannot score bytes: it is a token model; name a byte model"
        )
    if getattr(model, "window", 0) is None:
        raise CheckpointError(
            f"{folder} cannot score: its attention has no window, so long documents would need "
            "quadratic time; train an entropy model with model.window set"
        )
    if known.scorer is not None:
        return _load_own_scorer(folder, known.scorer, device), known.scorer
    lm, _ = load_model(folder, device, "float32")
    config = ScorerConfig(model=model, reset_at_newline=reset_at_newline)
    if not isinstance(lm, ScorerLM):
        return lm.get_scorer(reset_at_newline=reset_at_newline), config
    scorer = build_scorer(config)
    scorer.load_state_dict(lm.scorer.state_dict(), assign=True)
    return scorer.to(device).eval().requires_grad_(False), config


def _load_own_scorer(folder: Path, config: ScorerConfig, device: str | torch.device) -> Scorer:
    """Load the scorer of a patched model, without the model."""
    with torch.device("meta"):
        scorer = build_scorer(config)
    _fill(scorer, folder / SCORER, device)
    scorer.float().eval().requires_grad_(False)
    cpu.arrange(scorer)
    return cpu.fuse(scorer)


def save_scorer(folder: Path, scorer: Scorer, config: ScorerConfig) -> None:
    """Save a scorer as a checkpoint of its own.

    Raises:
        CheckpointError: the folder exists, or cannot be written.
    """
    transformer = getattr(scorer, "transformer", None)
    if isinstance(transformer, Transformer):
        lm = ByteLM(transformer)
    else:
        assert isinstance(scorer, nn.Module)
        lm = ScorerLM(scorer)
    save_model(folder, lm, ModelDescription(model=config.model))


def fingerprint(folder: Path) -> str:
    """Return a short hash of a checkpoint's weights and configuration."""
    return folder_fingerprint(folder, (CONFIG, MODEL))


def _fill(module: nn.Module, path: Path, device: str | torch.device) -> None:
    """Load the weights of a module that was built on the meta device."""
    tensors = load_tensors(path, module, device)
    expected = module.state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} is unknown" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, not {list(expected[name].shape)}"
        for name in expected.keys() & tensors.keys()
        if expected[name].shape != tensors[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit its {CONFIG}: {'; '.join(sorted(problems)[:3])}"
        )
    buffers = {name for name, _ in module.named_buffers()}
    for name, tensor in tensors.items():
        check_finite(name, tensor, path, allow_inf=name in buffers)
    module.load_state_dict(tensors, assign=True)
