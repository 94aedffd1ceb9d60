"""One part in this process: `python -m benchmarks.parts NAME FILE DEVICE full|tiny`."""

import sys
from importlib import import_module
from pathlib import Path

from benchmarks.parts.notes import Notes, Target
from benchmarks.record import describe_machine


def main() -> None:
    """Run the part that the arguments name, its findings going to the file."""
    name, file, device, size = sys.argv[1:]
    notes = Notes(Path(file))
    assert device in ("cpu", "cuda")
    target = Target(device, size == "tiny")
    notes.put("machine", describe_machine(device))
    with notes.attempt(name):
        import_module(f"benchmarks.parts.{name.replace('-', '_')}").run(target, notes)


if __name__ == "__main__":
    main()
