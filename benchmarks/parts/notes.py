"""Where a part measures, and where it leaves what it finds."""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import scrubbed, write_whole
from benchmarks.settings import Device


@dataclass(frozen=True)
class Target:
    """Where to measure, and how much."""

    device: Device = "cuda"
    tiny: bool = False
    """Models and rows of a size for tests."""


@dataclass
class Notes:
    """Findings of a part, on disk as soon as they are known: a part that is killed leaves them."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, value: Any) -> None:
        """Note a finding, in place of an older one of that name."""
        self.values[name] = value
        write_whole(self.path, json.dumps(self.values))

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Note what goes wrong in the block, and go on after it."""
        try:
            yield
        except Exception:
            self.put(f"{name}: error", scrubbed(traceback.format_exc()))
