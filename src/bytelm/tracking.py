"""Writers of metrics: a JSON Lines file, and optionally TensorBoard."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytelm.errors import ConfigError
from bytelm.progress import Callback
from bytelm.storage import read_lines, to_json, truncate_to_lines


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


class TensorBoardMetrics(Callback):
    """Writer of metrics as TensorBoard scalars.

    Args:
        folder: folder of the event files.
        resumed_step: last step of an earlier run to keep.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise ConfigError(
                "train.tensorboard needs TensorBoard: install bytelm[track]"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def on_end(self) -> None:
        """Flush and close the files."""
        self._writer.close()
