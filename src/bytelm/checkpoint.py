"""Checkpoints: folders that are complete by themselves, written whole or not at all.

::

    config.json          format, versions, model, patching, scorer, how it was trained
    model.safetensors    weights
    scorer.safetensors   weights of the scorer, where the patching rule needs one
    tokenizer.json       merges, where the model is one of tokens
    files.json           size and SHA-256 of every file above, written last

A folder is written under another name, flushed to disk and renamed, so a kill or a full disk at
any moment leaves either the old folder or the new one. Nothing is ever unpickled. A training run
adds its own files to a step's folder (see :mod:`bytelm.training.state`).
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bytelm import codec
from bytelm.config import ModelDescription, ScorerConfig, TableConfig, TransformerConfig, parse
from bytelm.errors import BytelmError, CheckpointError, ConfigError
from bytelm.model.build import LanguageModule, ScorerModule, build_model, build_scorer
from bytelm.model.ngram import NgramScorer
from bytelm.model.patched import PatchedModel
from bytelm.model.scorers import TransformerScorer
from bytelm.model.tokenized import TokenModel
from bytelm.model.transformer import Transformer
from bytelm.tokens import load_tokenizer
from bytelm.version import __version__

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, keeping processes apart is the user's care
    fcntl = None

FORMAT = 1
CONFIG, MODEL, SCORER, TOKENIZER, FILES = (
    "config.json",
    "model.safetensors",
    "scorer.safetensors",
    "tokenizer.json",
    "files.json",
)
LOCK = ".lock"
"""Name of the file that :func:`locked` holds."""
_TEMPORARY = ".writing-"


class CheckpointConfig(ModelDescription):
    """What ``config.json`` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = FORMAT
    bytelm: str = __version__
    torch: str = torch.__version__
    training: dict[str, Any] | None = None
    """How the model was trained; for people, read by nothing."""


def is_vacant(folder: Path) -> bool:
    """Whether a folder does not exist or holds nothing but what a killed process began with."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be.

    Raises:
        ConfigError: another process is at work in it.
        OSError: the disk refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with path.open("w") as file:
        try:
            # Held until the file is closed, whatever becomes of the process.
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another process is at work in {folder}: wait for it, or choose another folder"
            ) from None
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


@contextmanager
def writing_folder(target: Path, *, record: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` if the block succeeds, and vanishes if not.

    ``files.json`` is added at the end, unless ``record`` is off. What a killed writer of the same
    target left behind is removed first.

    Raises:
        CheckpointError: ``target`` exists, or the disk refused.
    """
    check_absent(target)
    temporary = target.with_name(f"{_TEMPORARY}{target.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        if record:
            described = {str(p.relative_to(temporary)): _describe(p) for p in files}
            write_json(temporary / FILES, described)
            files.append(temporary / FILES)
        for path in [*files, temporary]:
            _flush(path)
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, None)
        remedy = "free some space" if is_full else "check the path and its permissions"
        raise CheckpointError(
            f"could not write {target}: {error.strerror or error}; nothing was changed: {remedy} "
            "or choose another place, and run the command again"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # The folder is there; should this fail, only a power cut could still undo it.
    with suppress(OSError):
        _flush(target.parent)


def check_absent(target: Path) -> None:
    """Refuse to write where there is something already.

    Raises:
        CheckpointError: ``target`` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists: choose another name or remove it")


def remove_unfinished(parent: Path) -> None:
    """Remove what killed writers of any target in ``parent`` left behind."""
    for folder in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(folder: Path) -> dict[str, Any]:
    """Check every file of a folder against ``files.json``, and return that record.

    Raises:
        CheckpointError: the folder is not a checkpoint, or a file is missing, cut short or altered.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: there is no such folder")
    if not (folder / FILES).is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {FILES} (a folder of a training run or of "
            "`bytelm quickstart` is expected)"
        )
    record = read_json(folder / FILES)
    if not (isinstance(record, dict) and all(isinstance(one, dict) for one in record.values())):
        raise CheckpointError(f"{folder / FILES} is damaged: use another checkpoint")
    for name, expected in record.items():
        path = folder / name
        remedy = "restore it from a copy, or use another checkpoint"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {remedy}")
        size = path.stat().st_size
        if size != expected.get("bytes"):
            raise CheckpointError(
                f"{path} is damaged: it has {size} bytes where {expected.get('bytes')} were "
                f"written; {remedy}"
            )
        if _describe(path) != expected:
            raise CheckpointError(f"{path} is damaged: its contents have changed; {remedy}")
    return record


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors in safetensors form.

    Raises:
        OSError: the disk refused.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


_OLD_EMBEDDING = re.compile(r"(^|\.)embedding\.(bytes\.)?weight\b")
"""The embedding's name before every kind of model had the same one."""


def load_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read tensors in safetensors form.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        tensors = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return {_OLD_EMBEDDING.sub(r"\1embedding.ids.weight", n): x for n, x in tensors.items()}


def write_model(
    folder: Path,
    module: nn.Module,
    description: ModelDescription,
    training: dict[str, Any] | None = None,
) -> None:
    """Write a model's files into a folder that :func:`writing_folder` opened."""
    config = CheckpointConfig(
        model=description.model,
        patching=description.patching,
        scorer=description.scorer,
        tokens=description.tokens,
        context_bytes=description.context_bytes,
        training=training,
    )
    write_config(folder, config)
    if isinstance(module, PatchedModel):
        save_tensors(folder / MODEL, module.blt.state_dict())
        if isinstance(module.scorer, nn.Module):
            save_tensors(folder / SCORER, module.scorer.state_dict())
    elif isinstance(module, TokenModel):
        save_tensors(folder / MODEL, module.transformer.state_dict())
        module.tokenizer.save(folder / TOKENIZER)
    else:
        save_tensors(folder / MODEL, module.state_dict())


def write_config(folder: Path, config: CheckpointConfig) -> None:
    """Write a model's configuration into a folder that :func:`writing_folder` opened."""
    write_json(folder / CONFIG, config.model_dump(mode="json"))


def save_model(
    folder: Path,
    module: nn.Module,
    description: ModelDescription,
    training: dict[str, Any] | None = None,
) -> None:
    """Save a model as a checkpoint folder.

    Raises:
        CheckpointError: the folder exists, or cannot be written.
    """
    with writing_folder(folder) as temporary:
        write_model(temporary, module, description, training)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``: the folder itself, or the newest of a training run.

    Raises:
        CheckpointError: there is none.
    """
    steps = saved_steps(path)
    if steps:
        return steps[-1]
    if path.is_dir() and not (path / FILES).exists() and (path / "checkpoints").is_dir():
        raise CheckpointError(f"the run in {path} has not saved a checkpoint yet")
    return path


def saved_steps(run: Path) -> list[Path]:
    """Checkpoints of a training run, oldest first."""
    folders = (run / "checkpoints").glob("step-*") if run.is_dir() else []
    steps = [p for p in folders if p.name.removeprefix("step-").isdecimal()]
    return sorted(steps, key=lambda p: int(p.name.removeprefix("step-")))


def read_config(folder: Path) -> CheckpointConfig:
    """The configuration of a checkpoint.

    Raises:
        CheckpointError: it is missing, or of another version.
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


Precision = Literal["auto", "stored", "float32", "bfloat16"]
"""What weights are computed with: as stored, converted, or what suits the device."""


def load_model(
    path: Path, device: str | torch.device = "cpu", precision: Precision = "auto"
) -> tuple[LanguageModule | NgramScorer, CheckpointConfig]:
    """Load the checkpoint at ``path``, or the newest of the run there, ready for inference.

    Args:
        path: folder of a checkpoint or a run.
        device: where the weights go.
        precision: of the weights; ``auto`` for fp32 on the CPU, where anything else is slow, and
            as stored elsewhere. A scorer's are fp32 but with ``stored``, so that the patches do
            not depend on it.

    Raises:
        CheckpointError: there is none, it is damaged, or its weights do not fit its configuration.
    """
    folder = find_checkpoint(path)
    check_folder(folder)
    config = read_config(folder)
    with torch.device("meta"):
        module = build_model(config)
    if isinstance(module, PatchedModel):
        _fill(module.blt, folder / MODEL, device)
        if isinstance(module.scorer, nn.Module):
            _fill(module.scorer, folder / SCORER, device)
    else:
        _fill(module, folder / MODEL, device)
    if config.tokens and isinstance(module, Transformer):
        module = TokenModel(module, load_tokenizer(folder / TOKENIZER))
    set_precision(module, precision)
    return module.eval().requires_grad_(False), config


def set_precision(module: LanguageModule | NgramScorer, precision: Precision) -> None:
    """Convert a model's weights, and its scorer's to fp32; see :func:`load_model`."""
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise ConfigError(f"precision {precision!r} is not one of {known}")
    if precision == "stored" or isinstance(module, NgramScorer):
        return
    predictor = module.blt if isinstance(module, PatchedModel) else module
    on_cpu = next(predictor.parameters()).device.type == "cpu"
    if precision == "bfloat16":
        predictor.bfloat16()
    elif precision == "float32" or on_cpu:
        predictor.float()
    if isinstance(module, PatchedModel) and isinstance(module.scorer, TransformerScorer):
        module.scorer.float()


def load_scorer(
    path: Path, *, reset_at_newline: bool, device: str | torch.device = "cpu"
) -> tuple[ScorerModule, ScorerConfig]:
    """Load a checkpoint as a scorer.

    Raises:
        CheckpointError: as :func:`load_model`, or the model cannot score in bounded memory.
    """
    folder = find_checkpoint(path)
    check_folder(folder)
    model = read_config(folder).model
    if not isinstance(model, TransformerConfig | TableConfig):
        raise CheckpointError(f"{folder} holds a {model.kind} model, which is not a scorer")
    if isinstance(model, TransformerConfig) and model.vocab_size != codec.VOCAB_SIZE:
        raise CheckpointError(f"{folder} cannot score bytes: it is a model of tokens")
    if isinstance(model, TransformerConfig) and model.window is None:
        raise CheckpointError(
            f"{folder} cannot score: its attention has no window, so long documents would need "
            "quadratic time; train an entropy model with model.window set"
        )
    config = ScorerConfig(model=model, reset_at_newline=reset_at_newline)
    with torch.device("meta"):
        scorer = build_scorer(config)
    holder = scorer if isinstance(scorer, NgramScorer) else scorer.transformer
    _fill(holder, folder / MODEL, device)
    if isinstance(scorer, TransformerScorer):
        scorer.float()
    return scorer.eval().requires_grad_(False), config


def fingerprint(folder: Path) -> str:
    """A short hash of a checkpoint's weights and configuration."""
    record = read_json(folder / FILES)
    parts = f"{record[CONFIG]['sha256']}{record[MODEL]['sha256']}"
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _fill(module: nn.Module, path: Path, device: str | torch.device) -> None:
    """Give a module built on the meta device its weights."""
    tensors = load_tensors(path, device)
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
    module.load_state_dict(tensors, assign=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON for people and programs."""
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces ``path`` if the block succeeds, and vanishes if not.

    Readers find the old file or the new one, and other processes may do the same.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
