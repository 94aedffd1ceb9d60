"""Writers of metrics: a JSON Lines file, and optionally TensorBoard and Weights & Biases."""

import importlib.util
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytelm.errors import ConfigError
from bytelm.progress import Callback
from bytelm.storage import read_json, read_lines, to_json, truncate_to_lines, write_json


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the metrics that :class:`JsonlMetrics` wrote, one mapping for each line."""
    return [json.loads(line) for line in read_lines(path)]


class JsonlMetrics(Callback):
    """Writer of metrics to a JSON Lines file.

    Numbers that are not finite become null, since JSON cannot represent them.

    Args:
        path: the file.
        resume_at: bytes of the file to keep; lines that an earlier run wrote after them are
            removed.
    """

    def __init__(self, path: Path, resume_at: int = 0) -> None:
        if path.exists():
            # A power cut may have lost the end of the file.
            truncate_to_lines(path, resume_at)
        self._file = path.open("a", encoding="utf-8")

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        self._file.write(to_json({"step": step, **metrics}) + "\n")
        self._file.flush()

    def position(self) -> int:
        """Flush the file to disk, and return its size in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def on_end(self) -> None:
        """Close the file."""
        self._file.close()


def check_installed(package: str, setting: str) -> None:
    """Check that the package that a setting needs is installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{setting} needs {package}: pip install 'bytelm[track]'")


class TensorBoardMetrics(Callback):
    """Writer of metrics as TensorBoard scalars.

    Args:
        folder: folder of the event files.
        resumed_step: last step of an earlier run to keep.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        check_installed("tensorboard", "track.tensorboard")
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def on_end(self) -> None:
        """Flush and close the files."""
        self._writer.close()


class WandbMetrics(Callback):
    """Writer of metrics to a run of Weights & Biases.

    The run's id is kept in ``wandb.json``, so that a resumed training continues the same run. Steps
    that were logged after the checkpoint it resumes from appear twice, the later line last; the
    axis of all charts is ``step``.

    Args:
        folder: folder of the training run; wandb's own files are in ``wandb`` within.
        config: settings to show with the run.
        project: project of the run.
        entity: user or team; ``None`` for the default one.
        name: name of the run; ``None`` for that of the folder.
        mode: ``online``, ``offline`` (``wandb sync`` uploads later), ``disabled``, or ``None`` for
            that of the environment (``WANDB_MODE``).

    Raises:
        ConfigError: wandb is not installed, or the run cannot be started.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        project: str,
        entity: str | None = None,
        name: str | None = None,
        mode: str | None = None,
    ) -> None:
        check_installed("wandb", "track.wandb")
        import wandb

        record = folder / "wandb.json"
        if not record.exists():
            write_json(record, {"id": secrets.token_hex(8)})
        options: dict[str, Any] = {"mode": mode} if mode else {}
        try:
            self._run = wandb.init(
                project=project,
                entity=entity,
                name=name or folder.name,
                id=read_json(record)["id"],
                resume="allow",
                dir=folder,
                config=dict(config),
                # The terminal is ours: wandb would wrap its streams.
                settings=wandb.Settings(console="off"),
                **options,
            )
        except wandb.Error as error:
            raise ConfigError(
                f"track.wandb: the run cannot be started ({error}): log in with `wandb login`, or "
                "set track.wandb.mode=offline"
            ) from None
        self._run.define_metric("*", step_metric="step")

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics."""
        self._run.log({"step": step, **metrics})

    def on_end(self) -> None:
        """Finish the upload."""
        self._run.finish()
