"""Records: dated files that say what was measured, of what, on what.

::

    2026-11-23-cpu.json   everything, every sample included
    2026-11-23-cpu.md     its tables, drawn from the JSON alone

A record has one section a suite; a suite that is run again replaces its own and no other. Names of
machines, users and folders stay out of records.
"""

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.settings import Settings
from benchmarks.tables import draw
from bytelm.version import __version__

FORMAT = 1
ROOT = Path(__file__).parents[1]

Record = dict[str, Any]


def record_path(folder: Path, settings: Settings, date: datetime.date) -> Path:
    """Where the JSON of a day goes; quick runs stand apart, they are not measurements."""
    suffix = "-quick" if settings.quick else ""
    return folder / f"{date.isoformat()}-{settings.device}{suffix}.json"


def section_name(suite: str, settings: Settings) -> str:
    """The section of a suite; another precision has one of its own."""
    return suite if settings.precision == "float32" else f"{suite}, {settings.precision}"


def update(path: Path, name: str, section: dict[str, Any]) -> Record:
    """Put a section into the record at ``path``, in place of the one it had, and draw it anew."""
    record: Record = {"format": FORMAT, "date": path.name[:10], "sections": {}}
    if path.exists():
        record = json.loads(path.read_text("utf-8"))
    record["sections"][name] = section
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1) + "\n")
    redraw(path)
    return record


def redraw(path: Path) -> Path:
    """Draw the tables of a record again, beside it."""
    target = path.with_suffix(".md")
    write_whole(target, draw(json.loads(path.read_text("utf-8"))))
    return target


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def describe_run(settings: Settings, arguments: Sequence[str], commit: str | None) -> Record:
    """What is run on what: all that a reader needs to run it again."""
    from benchmarks.subjects import THEIRS_HAS_WINDOWS

    described = {
        "command": scrubbed(" ".join(["python -m benchmarks", *arguments])),
        "settings": asdict(settings),
        **describe_tree(commit),
        **describe_machine(settings.device),
    }
    if not THEIRS_HAS_WINDOWS:
        described["note"] = (
            "This version of transformers ignores windows, so it is only measured on texts no "
            "longer than that of ours."
        )
    return described


def describe_tree(commit: str | None = None) -> Record:
    """The commit, and whether files differ from it, records aside.

    Args:
        commit: what to say where the tree has no history to ask; ``None`` asks.
    """
    found = commit or _git("rev-parse", "HEAD")
    if commit or found is None:
        return {"commit": found or "unknown", "dirty": None}
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/records")
    return {"commit": found, "dirty": bool(changes)}


def describe_machine(device: str) -> Record:
    """Versions and hardware; torch answers, so it is only asked for here."""
    import torch

    versions = {
        "python": platform.python_version(),
        "bytelm": __version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    known: Record = {
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        known["device"] = torch.cuda.get_device_name()
        versions["cuda"] = torch.version.cuda or "none"
    return known


def processor_name() -> str:
    """The name of the processor, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def scrubbed(text: str) -> str:
    """Text without names of machines and folders: of a path outside the project its last part."""
    text = text.replace(str(Path.home()), "~")
    # Files of the project and of packages, whose paths may have been cut short already.
    text = re.sub(r"[\w.@+~/-]*(?=src/bytelm/|benchmarks/|tests/|site-packages/)", "", text)
    text = re.sub(r"(?<![\w.:/])~?/(?:[\w.@+~-]+/)+", "", text)
    node = platform.node()
    return re.sub(rf"\b{re.escape(node)}\b", "HOST", text) if len(node) > 3 else text


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def progress(line: str) -> None:
    """Say what is going on."""
    print(line, file=sys.stderr, flush=True)
