"""All that a GPU can tell within ten minutes, in one call: `python -m benchmarks.gpu --out FOLDER`.

Every part runs in a process of its own, with a share of the time that is left, so that none takes
another down: a part that fails leaves its traceback, one that is stopped what it had found. The
record, ``gpu.json``, is written anew after each.

To see that it runs without a GPU: `--device cpu --tiny`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.parts.notes import Target
from benchmarks.record import ROOT, describe_tree, progress, scrubbed, write_whole
from benchmarks.settings import Device

FILE = "gpu.json"
SUITES = "model,cross-attention,generation,memory,scorer"
TAIL = 6000
"""Characters of the end of a part's output that are kept."""
SHOWN = 2500
"""Characters of a part's findings that are printed."""


class Part(NamedTuple):
    """Something to measure."""

    weight: float
    """Share of the time, relative to the other parts'."""
    module: bool = True
    """Whether it is one of `benchmarks.parts`; the others are commands."""


PARTS = {
    "hardware": Part(20),
    "parity": Part(60),
    "tests": Part(80, module=False),
    "training": Part(190),
    "plain": Part(90),
    "large": Part(60),
    "suites": Part(90, module=False),
}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of the record.")],
    device: Annotated[Device, typer.Option(help="cpu only makes sense with --tiny.")] = "cuda",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Tiny models and rows: see that it runs.")
    ] = False,
    parts: Annotated[
        str, typer.Option(help=f"Parts to run, separated by commas: {', '.join(PARTS)}.")
    ] = ",".join(PARTS),
    minutes: Annotated[float, typer.Option(help="Time for all parts together.")] = 9.5,
    commit: Annotated[
        str | None, typer.Option(help="What to record, in a copy of the tree without history.")
    ] = None,
) -> None:
    """Measure everything that needs a GPU, in one call of bounded length.

    The parts are rates of the device (hardware), fast paths beside their twins
    (parity), `pytest -m gpu` (tests), training steps of recipe blt-1b (training)
    and of a plain transformer (plain), generation in bf16 (large), and the suites
    of `python -m benchmarks` on CUDA (suites), with a record beside gpu.json.

    [dim]python -m benchmarks.gpu --out results
    python -m benchmarks.gpu --out results --parts hardware,training --minutes 5
    python -m benchmarks.gpu --out results --device cpu --tiny[/]

    """
    wanted = [name.strip() for name in parts.split(",")]
    for name in wanted:
        if name not in PARTS:
            raise typer.BadParameter(
                f"{name!r} is not one of {', '.join(PARTS)}", param_hint="--parts"
            )
    out.mkdir(parents=True, exist_ok=True)
    run_parts(wanted, Target(device, tiny), out, time.monotonic() + 60 * minutes, commit)


def run_parts(
    names: Sequence[str], target: Target, out: Path, deadline: float, commit: str | None
) -> None:
    """Run parts in turn; what one leaves of its time goes to the others."""
    record: dict[str, Any] = {
        "format": 1,
        "date": time.strftime("%Y-%m-%d"),
        "command": scrubbed(" ".join(["python -m benchmarks.gpu", *sys.argv[1:]])),
        "tiny": target.tiny,
        **describe_tree(commit),
        "parts": {},
    }
    for index, name in enumerate(names):
        weights = [PARTS[other].weight for other in names[index:]]
        limit = max(deadline - time.monotonic(), 1.0) * weights[0] / sum(weights)
        progress(f"{name}: at most {limit:.0f} s")
        record["parts"][name] = run_part(name, target, out, limit)
        write_whole(out / FILE, json.dumps(record, indent=1) + "\n")
        shown = json.dumps(record["parts"][name])
        print(f"{name}: {shown[:SHOWN]}{' ...' if len(shown) > SHOWN else ''}", flush=True)


def run_part(name: str, target: Target, out: Path, limit: float) -> dict[str, Any]:
    """Run one part in a process of its own; its findings, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.json"
        size = "tiny" if target.tiny else "full"
        command = ["-m", "benchmarks.parts", name, str(notes), target.device, size]
        if not PARTS[name].module:
            command = _commands(target, out)[name]
        ended = run_command([sys.executable, *command], limit)
        if notes.exists():
            ended["findings"] = json.loads(notes.read_text("utf-8"))
    return ended


def run_command(command: Sequence[str], limit: float) -> dict[str, Any]:
    """Run a command for at most ``limit`` seconds, with all that it starts."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_child_environment(),
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        output.seek(0)
        text = output.read()
    return {
        "seconds": time.monotonic() - began,
        "limit": limit,
        "status": status,
        "timed_out": status is None,
        "output": scrubbed(text[-TAIL:]),
    }


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _child_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {
        **kept,
        "PYTHONUNBUFFERED": "1",
        # Models of this size come and go: let freed memory serve blocks of any size.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }


def _commands(target: Target, out: Path) -> dict[str, list[str]]:
    """The parts that are commands of their own, without the interpreter."""
    pytest = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    # Without beartype the hook that checks types and shapes cannot be installed.
    pytest += ["-n", "0"] if find_spec("beartype") else ["-o", "addopts="]
    suites = ["-m", "benchmarks", "--device", target.device, "--out", str(out.resolve())]
    if target.device == "cpu":
        pytest += ["--collect-only", "tests/test_kernels.py"]
    if target.tiny:
        return {"tests": pytest, "suites": [*suites, "--quick", "--suite", "cross-attention"]}
    return {"tests": pytest, "suites": [*suites, "--suite", SUITES]}


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.gpu")
