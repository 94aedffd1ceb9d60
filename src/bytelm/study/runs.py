"""Runs, trained in slices and measured, several at once.

::

    STUDY/runs/NAME/                a training run, as `bytelm train` makes it
    STUDY/runs/NAME/slices.jsonl    a line for each time it was worked on
    STUDY/runs/NAME/result.json     written last, when it is trained and measured

A run is a process of its own: one that dies takes nothing with it, and goes on next time from its
last checkpoint to the same numbers.
"""

import json
import os
import re
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bytelm.checkpoint import read_json, replacing, write_json
from bytelm.config import differences
from bytelm.errors import BytelmError, ConfigError, TrainingError
from bytelm.study.measuring import SLICES, describe, machine, measure
from bytelm.study.plan import Plan, Run
from bytelm.study.settling import settle_run
from bytelm.tracking import LiveLine
from bytelm.training import train
from bytelm.training.run import METRICS, RESUME_FREELY
from bytelm.training.setup import choose_device

RESULT, ERROR = "result.json", ".error.txt"
FAILED = 3
"""Exit status of a run's process that wrote down why it could not go on."""
POLL_SECONDS = 1.0


def finished_result(plan: Plan, run: Run, out: Path) -> dict[str, Any] | None:
    """What a run has reached, if it is trained and measured.

    Raises:
        ConfigError: it was made by other settings than those the plan has now.
    """
    path = _folder(out, run) / RESULT
    if not path.exists():
        return None
    result = read_json(path)
    settled = settle_run(plan, run, out)
    now = describe(plan, settled, out)
    changed = differences(result["recipe"], now["recipe"])
    changed = [line for line in changed if line.split(":")[0] not in RESUME_FREELY]
    changed += differences(result["evaluated"], now["evaluated"])
    for key in ("counts_scorer", "data", "tokenizer"):
        if result[key] != now[key]:
            changed.append(f"{key}: {result[key]} -> {now[key]}")
    if changed:
        raise ConfigError(
            f"run {run.name!r} in {out} was made by another plan, or of other data "
            f"({'; '.join(changed)}): choose another --out, or remove {path.parent} to make it anew"
        )
    return result


def run_all(
    plan: Plan,
    runs: list[Run],
    out: Path,
    *,
    workers: int,
    console: Console,
    deadline: float | None = None,
) -> list[str]:
    """Train and measure every run that is not finished, several at once.

    A signal, or the deadline, ends all of them after the step in progress, with a checkpoint.

    Args:
        plan: of the study.
        runs: which.
        out: folder of the study, its text prepared.
        workers: processes; they share the threads of this one and, with CUDA, are spread over the
            devices.
        console: where progress is shown.
        deadline: by ``time.time()``, after which no step begins.

    Returns:
        What went wrong, a line for each run that did.

    Raises:
        ConfigError: a budget cannot be met; nothing is trained then.
    """
    pool = _Pool(plan, runs, out, workers, deadline)
    with LiveLine(console, "study", 100) as line:
        try:
            while pool.start():
                time.sleep(POLL_SECONDS)
                for news in pool.collect():
                    line.note(news)
                line.update(int(100 * pool.share_done()), ", ".join(pool.active))
        except KeyboardInterrupt:
            pool.stop()
            raise
    return pool.problems


class _Pool:
    """Processes at work on runs."""

    def __init__(
        self, plan: Plan, runs: list[Run], out: Path, workers: int, deadline: float | None
    ) -> None:
        self.plan, self.out, self.workers, self.deadline = plan, out, workers, deadline
        self.pending = [run for run in runs if finished_result(plan, run, out) is None]
        self.settled = {run.name: settle_run(plan, run, out) for run in self.pending}
        self.done_flops = 0.0
        self.active: dict[str, tuple[int, Run, Any]] = {}
        self.problems: list[str] = []

    def start(self) -> bool:
        """Give idle workers runs; whether anything is going on."""
        is_late = self.deadline is not None and time.time() > self.deadline
        while self.pending and len(self.active) < self.workers and not is_late:
            run = self.pending.pop(0)
            taken = {slot for slot, _, _ in self.active.values()}
            slot = min(set(range(self.workers)) - taken)
            arguments = (self.plan, run, self.out, self.deadline, slot, self.workers)
            process = get_context("spawn").Process(target=_work, args=arguments, name=run.name)
            process.start()
            self.active[run.name] = (slot, run, process)
        return bool(self.active)

    def collect(self) -> list[str]:
        """News of processes that have ended."""
        news = []
        for name, (_, run, process) in list(self.active.items()):
            if process.is_alive():
                continue
            del self.active[name]
            if process.exitcode:
                self.problems.append(f"{name}: {_problem(self.out, run, process.exitcode)}")
                news.append(self.problems[-1])
            elif result := finished_result(self.plan, run, self.out):
                self.done_flops += self.settled[name].flops
                news.append(_news(result))
        return news

    def share_done(self) -> float:
        """Of the FLOPs of all runs that were not finished."""
        active = [(self.settled[name], run) for name, (_, run, _) in self.active.items()]
        spent = sum(one.flops * share_done(self.out, run, one.steps) for one, run in active)
        return (self.done_flops + spent) / max(sum(one.flops for one in self.settled.values()), 1.0)

    def stop(self) -> None:
        """Ask every process to end with a checkpoint, and wait for it."""
        for _, _, process in self.active.values():
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)
        for _, _, process in self.active.values():
            process.join()


def _work(plan: Plan, run: Run, out: Path, deadline: float | None, slot: int, workers: int) -> None:
    """A worker's process: a slice of one run."""
    if torch.cuda.is_available():
        torch.cuda.set_device(slot % torch.cuda.device_count())
    else:
        # Of what OMP_NUM_THREADS leaves: studies that each take all cores fight for them.
        torch.set_num_threads(max(torch.get_num_threads() // workers, 1))
    folder = _folder(out, run)
    (folder / ERROR).unlink(missing_ok=True)
    try:
        left = None if deadline is None else max(deadline - time.time(), 0.0)
        run_slice(plan, run, out, left)
    except Exception as error:
        folder.mkdir(parents=True, exist_ok=True)
        what = str(error) if isinstance(error, BytelmError) else repr(error)
        (folder / ERROR).write_text(what, "utf-8")
        if isinstance(error, BytelmError):
            sys.exit(FAILED)
        raise


def run_slice(plan: Plan, run: Run, out: Path, time_limit: float | None = None) -> bool:
    """Work on a run until it is finished or time is up; whether it is finished.

    A run that diverges is finished too: that is its result.

    Raises:
        ConfigError: the study changed since the run began.
        DataError, CheckpointError: as :func:`bytelm.training.train`.
    """
    folder = _folder(out, run)
    settled = settle_run(plan, run, out)
    device = choose_device(settled.recipe.train)
    began = time.monotonic()
    try:
        trained = train(settled.recipe, folder, time_limit=time_limit)
    except TrainingError as error:
        _finish(folder, {**describe(plan, settled, out), "failure": str(error)})
        return True
    record = {
        "steps": trained.step,
        "seconds": time.monotonic() - began,
        "peak_bytes": _peak_bytes(device),
        "machine": machine(device),
    }
    with (folder / SLICES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    if trained.finished:
        _finish(folder, measure(plan, settled, out, folder, trained.bytes_seen))
    return trained.finished


def share_done(out: Path, run: Run, steps: int) -> float:
    """Of a run's steps, by what it last reported; 1 where it has been measured too."""
    if (_folder(out, run) / RESULT).exists():
        return 1.0
    path = _folder(out, run) / METRICS
    if not path.exists():
        return 0.0
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        lines = file.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        try:
            return min(float(json.loads(line)["step"]) / steps, 0.99)
        except (ValueError, KeyError, TypeError):
            # Cut off at the beginning, not yet whole at the end, or about something else.
            continue
    return 0.0


def _folder(out: Path, run: Run) -> Path:
    return out / "runs" / run.name


def _finish(folder: Path, result: dict[str, Any]) -> None:
    with replacing(folder / RESULT) as temporary:
        write_json(temporary, result)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not what getrusage says, which on Linux begins with the peak of the parent.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text("ascii"))
        if found:
            return int(found[1]) * 1024
    import resource  # not there on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _problem(out: Path, run: Run, exit_code: int) -> str:
    path = _folder(out, run) / ERROR
    if exit_code > 0 and path.exists():
        return path.read_text("utf-8")
    how = f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"status {exit_code}"
    return f"its process ended early ({how}); run the same command again to go on"


def _news(result: dict[str, Any]) -> str:
    name = result["run"]["name"]
    if result["failure"]:
        return f"{name}: {result['failure']}"
    return f"{name}: {result['bpb']:.4f} bpb, {result['train_bytes'] / 1e6:.1f} MB read"
